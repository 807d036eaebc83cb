"""Tensors handed to the writers of formats, with every request for their elements noted."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bioinit import formats
from bioinit.contexts import open_checkpoint
from bioinit.formats.protocol import Outgoing, WriteOptions
from bioinit.storage import Journal

WORK = "the same work"


class Killed(Exception):
    """Stands for whatever ends a writer half-way."""


class Request(NamedTuple):
    key: str
    first: int
    count: int
    bytes: int


class Source:
    """A state dict as outgoing tensors. ``breaks_at``: the request that fails, counted from 0."""

    def __init__(self, state: Mapping[str, torch.Tensor], breaks_at: int | None = None) -> None:
        self.state = state
        self.requests: list[Request] = []
        self.breaks_at = breaks_at
        self._lock = threading.Lock()

    @property
    def outgoing(self) -> list[Outgoing]:
        return [self._one(key, tensor) for key, tensor in self.state.items()]

    @property
    def largest(self) -> int:
        return max((request.bytes for request in self.requests), default=0)

    def keys(self) -> set[str]:
        return {request.key for request in self.requests}

    def _one(self, key: str, tensor: torch.Tensor) -> Outgoing:
        flat = tensor.contiguous().reshape(-1)

        def fill(first: int, memory: torch.Tensor) -> None:
            assert memory.dim() == 1 and memory.is_contiguous() and memory.dtype == flat.dtype
            assert memory.numel() and 0 <= first <= first + memory.numel() <= flat.numel()
            with self._lock:
                if len(self.requests) == self.breaks_at:
                    self.breaks_at = None  # only what stops the others can keep them from going on
                    raise Killed("killed half-way")
                self.requests.append(Request(key, first, memory.numel(), memory.nbytes))
            memory[...] = flat[first : first + memory.numel()]

        return Outgoing(key, tuple(tensor.shape), tensor.dtype, fill)


def write(
    name: str, folder: Path, source: Source | Mapping[str, torch.Tensor], **options: Any
) -> Source:
    """Write with the format ``name``; a journal that lies in ``folder`` is gone on with."""
    source = source if isinstance(source, Source) else Source(source)
    folder.mkdir(exist_ok=True)
    writer = formats.load(name).write
    assert writer is not None
    with Journal(folder, WORK) as journal:
        writer(folder, source.outgoing, WriteOptions(**options), journal)
    (folder / Journal.NAME).unlink()
    return source


def read(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The format, and all tensors through our own reader."""
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.format, {key: checkpoint.read(key) for key in checkpoint.tensors}


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and every bit."""
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        assert torch.equal(bits(found[key]), bits(tensor)), key


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def values(shape: Iterable[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits at all, so that a value that was rounded or a byte that moved is seen."""
    sizes = tuple(shape)
    count = torch.Size(sizes).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, sizes, generator=generator).bool()
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(sizes)
