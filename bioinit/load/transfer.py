"""Bytes from files into tensors, in parallel: runs straight into place, the rest through a buffer.

A run of bytes that is contiguous on both sides is read into the tensor's own memory; runs that
follow one another in a file share one scatter read. A cast, a strided copy or a copy to a device
goes through a small buffer that each worker reuses: what lies close together in the file is read
once and copied from there. Nothing is mapped, and no file and no model has a second copy.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from bioinit.layout import Overlap, blocks
from bioinit.load.staging import Staging
from bioinit.plan import STAGING_BYTES, Copy
from bioinit.storage import File, run_workers

READ_BYTES = 16 * 2**20  # longer reads let the last worker run alone, shorter ones are more calls
SCATTER_BUFFERS = 512

Progress = Callable[[int], None]
"""Told how many more bytes have been read; called from worker threads, one at a time."""


class Job(NamedTuple):
    """One copy and the tensor it goes into, from whose first element ``copy`` counts."""

    copy: Copy
    tensor: torch.Tensor


class Run(NamedTuple):
    """``size`` bytes of a file that belong, as they are, at an address."""

    file: int
    position: int
    size: int
    address: int


class Segment(NamedTuple):
    """``size`` bytes of a file that are read into a buffer and copied on from there."""

    file: int
    position: int
    size: int
    dtype: torch.dtype
    overlap: Overlap
    tensor: torch.Tensor
    add: float

    def source(self, buffer: torch.Tensor) -> torch.Tensor:
        """The elements of ``buffer``, uint8, whose first byte is ours, with what is added."""
        flat = buffer[: self.size].view(self.dtype)
        start = flat.storage_offset()
        held = flat.as_strided(self.overlap.sizes, self.overlap.source_strides, start)
        if not self.add:
            return held
        return held.to(torch.promote_types(self.dtype, torch.float32)) + self.add

    def target(self) -> torch.Tensor:
        """Where they belong, as a view of the tensor."""
        start = self.tensor.storage_offset() + self.overlap.target_start
        return self.tensor.as_strided(self.overlap.sizes, self.overlap.target_strides, start)


class _Task(Protocol):
    def __call__(self, staging: Staging) -> None: ...


class Transfer:
    """Moves jobs with a few workers and counts the bytes. One instance serves one load."""

    def __init__(
        self,
        files: Sequence[File],
        workers: int,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        self._files = files
        self._workers = workers
        self._device = device
        self._progress = progress
        self._lock = threading.Lock()
        self.bytes_read = 0

    def move(self, jobs: Iterable[Job]) -> None:
        """Carry out ``jobs``; all are done when it returns.

        Raises:
            StorageError: the file system refused.
            CorruptCheckpoint: a file is shorter than its header said.
        """
        self._run(self._tasks(jobs))

    def move_here(self, jobs: Iterable[Job], staging: Staging) -> None:
        """Carry out ``jobs`` in the thread that asks, with its own buffers."""
        for task in self._tasks(jobs):
            task(staging)

    def _tasks(self, jobs: Iterable[Job]) -> list[_Task]:
        runs: list[Run] = []
        staged: list[Job] = []
        for job in jobs:
            copy, tensor = job
            if tensor.device.type == "cpu" and copy.is_run(tensor.dtype):
                width = copy.dtype.itemsize
                position = copy.offset + copy.overlap.source_start * width
                address = tensor.data_ptr() + copy.overlap.target_start * width
                runs.append(Run(copy.file, position, copy.bytes, address))
            else:
                staged.append(job)
        tasks: list[_Task] = [self._scatter(batch) for batch in _scattered(_split(runs))]
        return tasks + [self._stage(batch) for batch in _together(staged)]

    def same(self, jobs: Iterable[Job], staging: Staging | None = None) -> bool:
        """Whether every job's bytes, cast as they would be, are what its tensor already holds."""
        staging = staging or Staging(torch.device("cpu"))
        with torch.no_grad():
            for batch in _together(jobs):
                buffer = self._fill(batch, staging)
                for segment in batch:
                    source = segment.source(buffer[segment.position - batch[0].position :])
                    target = segment.target().to("cpu")
                    cast = source.to(target.dtype).contiguous().reshape(-1).view(torch.uint8)
                    if not torch.equal(cast, target.contiguous().reshape(-1).view(torch.uint8)):
                        return False
        return True

    def _run(self, tasks: Sequence[_Task]) -> None:
        pending = iter(tasks)

        def next_task() -> _Task | None:
            with self._lock:
                return next(pending, None)

        def work(stopped: threading.Event) -> None:
            with Staging(self._device) as staging:
                while not stopped.is_set() and (task := next_task()) is not None:
                    task(staging)

        run_workers(work, min(self._workers, len(tasks)))

    def _scatter(self, runs: Sequence[Run]) -> _Task:
        def task(staging: Staging) -> None:
            buffers = [_memory(run.address, run.size) for run in runs]
            self._read(runs[0].file, runs[0].position, buffers, sum(run.size for run in runs))

        return task

    def _stage(self, batch: Sequence[Segment]) -> _Task:
        def task(staging: Staging) -> None:
            buffer = self._fill(batch, staging)
            with torch.no_grad(), staging.copying():
                for segment in batch:
                    source = segment.source(buffer[segment.position - batch[0].position :])
                    segment.target().copy_(source, non_blocking=staging.is_asynchronous)

        return task

    def _fill(self, batch: Sequence[Segment], staging: Staging) -> torch.Tensor:
        start = batch[0].position
        size = max(segment.position + segment.size for segment in batch) - start
        buffer = staging.buffer(size)
        self._read(batch[0].file, start, [_memory(buffer.data_ptr(), size)], size)
        return buffer

    def _read(self, file: int, position: int, buffers: Sequence[object], size: int) -> None:
        self._files[file].read_into(position, buffers)
        with self._lock:
            self.bytes_read += size
            if self._progress is not None:
                self._progress(size)


def _split(runs: Sequence[Run]) -> Iterator[Run]:
    """Runs in file order, none longer than one read."""
    for run in sorted(runs):
        if run.size <= READ_BYTES:
            yield run
            continue
        for done in range(0, run.size, READ_BYTES):
            size = min(READ_BYTES, run.size - done)
            yield Run(run.file, run.position + done, size, run.address + done)


def _scattered(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Runs that lie back to back in one file, as many as one scatter read takes."""
    batch: list[Run] = []
    end = total = 0
    for run in runs:
        follows = batch and run.file == batch[-1].file and run.position == end
        if batch and not (
            follows and len(batch) < SCATTER_BUFFERS and total + run.size <= READ_BYTES
        ):
            yield batch
            batch, total = [], 0
        batch.append(run)
        end = run.position + run.size
        total += run.size
    if batch:
        yield batch


def _together(jobs: Iterable[Job]) -> Iterator[list[Segment]]:
    """Segments that touch or overlap in a file, as many as one buffer takes."""
    batch: list[Segment] = []
    start = end = 0
    for segment in sorted(_segments(jobs), key=lambda s: (s.file, s.position)):
        after = segment.position + segment.size
        joins = (
            batch
            and segment.file == batch[0].file
            and segment.position <= end
            # A width that does not divide the distance would put it at an odd address.
            and (segment.position - start) % segment.dtype.itemsize == 0
            and max(after, end) - start <= 2 * STAGING_BYTES
        )
        if batch and not joins:
            yield batch
            batch = []
        if not batch:
            start, end = segment.position, after
        batch.append(segment)
        end = max(end, after)
    if batch:
        yield batch


def _segments(jobs: Iterable[Job]) -> Iterator[Segment]:
    for copy, tensor in jobs:
        width = copy.dtype.itemsize
        for block in blocks(copy.overlap, STAGING_BYTES // width):
            position = copy.offset + block.overlap.source_start * width
            size = block.span * width
            yield Segment(copy.file, position, size, copy.dtype, block.overlap, tensor, copy.add)


def _memory(address: int, size: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * size).from_address(address)
