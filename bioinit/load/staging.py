"""One worker's buffers: ordinary memory for a CPU, pinned memory and a stream of its own for a GPU.

On a GPU the read of one buffer overlaps the copy of the others: a buffer is handed out again only
after the copies that left it have finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch

from bioinit.load.memory import allocate
from bioinit.plan import STAGING_BYTES

BUFFERS_IN_FLIGHT = 3


class Staging:
    """Buffers that are reused from one task to the next; belongs to one thread."""

    def __init__(self, device: torch.device) -> None:
        self.is_asynchronous = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if self.is_asynchronous:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # The targets' memory may still be in use by what was queued before they got it.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._buffers: list[torch.Tensor | None] = [None] * (
            BUFFERS_IN_FLIGHT if self.is_asynchronous else 1
        )
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._turn = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def buffer(self, size: int) -> torch.Tensor:
        """At least ``size`` bytes, uint8, whose earlier content nobody needs any more."""
        self._turn = (self._turn + 1) % len(self._buffers)
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        known = self._buffers[self._turn]
        if known is None or known.numel() < size:
            wanted = max(size, 2 * STAGING_BYTES)
            known = (
                torch.empty(wanted, dtype=torch.uint8, pin_memory=True)
                if self.is_asynchronous
                else allocate((wanted,), torch.uint8, torch.device("cpu"))
            )
            self._buffers[self._turn] = known
        return known

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copies out of the last buffer go on this worker's stream; the buffer waits for them."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._copied[self._turn] = event
