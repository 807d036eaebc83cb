"""Tensors into files, a slab at a time, by a few threads; what is finished is noted.

A *unit* is what is noted together once it is on the disk: a shard, the partitions of a layer, a
part. Units are begun in order and their tasks are shared out, so that a thread that is done with
one does not wait for the others; who does the last task of a unit finishes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bioinit.storage import Journal, disk_error, run_workers, worker_count

SLAB_BYTES = 16 * 2**20
"""What a thread asks for at once: with eight of them, half of what a conversion may need."""


_DIGESTED_AT_ONCE = 2**20  # it is still in the cache of the processor that read it
_CANNOT_PROMISE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)


class Stopped(Exception):
    """Another thread failed, or a person interrupted: what is being written is not needed."""


class Desk:
    """What one thread works with: memory that it uses again, and whether to go on."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._memory = torch.empty(0, dtype=torch.uint8)

    def memory(self, size: int) -> torch.Tensor:
        """``size`` bytes; what was handed out before is overwritten.

        Raises:
            Stopped: there is no need for more.
        """
        if self._stopped.is_set():
            raise Stopped
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]


Task = Callable[[Desk], None]


class Following:
    """The SHA-256 of a file that several threads are writing, in any order.

    Whoever has written a slab carries on where the digest stands, as far as the file is written
    without a gap; so it is done soon after the last byte, and no thread only waits for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sum = hashlib.sha256()
        self._at = 0
        self._ends: dict[int, int] = {}
        self._turn = threading.Lock()

    def written(self, begin: int, end: int) -> None:
        """The bytes from ``begin`` to ``end`` are in the file."""
        self._ends[begin] = end
        if self._turn.acquire(blocking=False):
            try:
                self._go_on()
            finally:
                self._turn.release()

    def result(self) -> str:
        """The digest, once everything is written."""
        with self._turn:
            self._go_on()
        return self._sum.hexdigest()

    def _go_on(self) -> None:
        if self._at not in self._ends:
            return
        with writing(self._path), open(self._path, "rb", buffering=0) as file:
            while (end := self._ends.pop(self._at, None)) is not None:
                file.seek(self._at)
                while self._at < end:
                    data = file.read(min(end - self._at, _DIGESTED_AT_ONCE))
                    if not data:
                        raise OSError(errno.EIO, "the file ended early")
                    self._sum.update(data)
                    self._at += len(data)


def _nothing(desk: Desk) -> None:
    """All there is to do for a unit without bytes."""


class Unit(ABC):
    """Files that are noted together under ``key``."""

    def __init__(self, key: str) -> None:
        self.key = key

    @abstractmethod
    def is_whole(self, note: Any) -> bool:
        """Whether what an earlier process noted is still there."""

    def reserve(self, desk: Desk) -> None:  # noqa: B027
        """Have room for it, where its size is known ahead; may be called while it is written."""

    @abstractmethod
    def begin(self) -> Sequence[Task]:
        """Make the files, and say what there is to do."""

    @abstractmethod
    def finish(self) -> Any:
        """Wait until all is on the disk, and say what to note: plain data."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is open. Called in any case, also before :meth:`begin`."""


def write_units(units: Sequence[Unit], journal: Journal, *, workers: int | None = None) -> None:
    """Write the units that ``journal`` does not hold, and note each that is done."""
    notes = journal.notes
    waiting = [
        unit for unit in units if unit.key not in notes or not unit.is_whole(notes[unit.key])
    ]
    lock = threading.Lock()
    left: dict[str, int] = {}

    def claims() -> Iterator[tuple[Unit | None, Task]]:
        # What does not fit on the disk is noticed before hours of work; meanwhile others begin.
        for unit in waiting:
            yield None, unit.reserve
        for unit in waiting:
            tasks = unit.begin() or (_nothing,)
            left[unit.key] = len(tasks)
            for task in tasks:
                yield unit, task

    pending = claims()

    def next_claim() -> tuple[Unit | None, Task] | None:
        with lock:
            return next(pending, None)

    def done(unit: Unit) -> None:
        with lock:
            left[unit.key] -= 1
            is_last = not left[unit.key]
        if is_last:
            note = unit.finish()
            with lock:
                journal.note(unit.key, note)

    def work(stopped: threading.Event) -> None:
        desk = Desk(stopped)
        try:
            while not stopped.is_set() and (claim := next_claim()) is not None:
                unit, task = claim
                task(desk)
                if unit is not None:
                    done(unit)
        except Stopped:
            pass

    try:
        run_workers(work, workers or worker_count())
    finally:
        for unit in waiting:
            unit.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system as a StorageError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, f"write {path}") from error


def reserve(path: Path, size: int) -> None:
    """Make the file ``path`` with room for ``size`` bytes, so that a full disk is noticed now."""
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, size)
            allocate(descriptor, size)
        finally:
            os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Have room for ``size`` bytes, where the file system can promise that."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_PROMISE:
            raise


def put(descriptor: int, data: torch.Tensor, position: int) -> None:
    """Write all of ``data``, contiguous, at byte ``position``."""
    left = data.view(-1).view(torch.uint8).numpy().data
    while left:
        written = os.pwrite(descriptor, left, position)
        left, position = left[written:], position + written
