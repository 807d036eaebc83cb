"""Bytes that no file holds as they are: decoded, combined from several files, one value, memory.

To a reader and to the loader such bytes are a file like any other, so nothing behind this room
knows the difference; ``how`` says it to people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bioinit.errors import CorruptCheckpoint
from bioinit.storage.file import File
from bioinit.storage.handle import Handle

Make = Callable[[int, int], Any]
"""Given an offset and a size, exactly those bytes, as anything with a buffer. Several threads call
it at once."""


class Made(File):
    """``size`` bytes that ``make`` makes when they are asked for.

    ``beside`` is the file that messages name and whose time counts; ``sources`` are the files that
    ``make`` reads; ``how`` tells people what is done, in few words.
    """

    __slots__ = ("_make", "_remarks", "_sources", "_what")

    def __init__(
        self,
        beside: File,
        name: str,
        size: int,
        make: Make,
        *,
        sources: Sequence[File] = (),
        how: str,
    ) -> None:
        mtime_ns = max((file.mtime_ns for file in sources), default=beside.mtime_ns)
        super().__init__(beside._handle, name, offset=0, size=size, mtime_ns=mtime_ns)
        self._make = make
        self._sources = tuple(sources)
        self._what = how
        self._remarks: list[str] = []

    @property
    def how(self) -> str | None:
        return self._what

    @property
    def remarks(self) -> list[str]:
        return self._remarks

    @property
    def opened(self) -> int:
        return max((file.opened for file in self._sources), default=0)

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._sources)

    def window(self, name: str, offset: int, size: int) -> Made:
        """The ``size`` bytes from ``offset`` on; remarks made while reading are shared."""
        self._require(offset, size)
        shown = Made(
            self,
            name,
            size,
            lambda at, length: self._make(offset + at, length),
            sources=self._sources,
            how=self._what,
        )
        shown._remarks = self._remarks
        return shown

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset`` on, made now."""
        self._require(offset, size)
        return bytes(self._made(offset, size))

    def read_into(self, offset: int, buffers: Sequence[Any]) -> None:
        """Fill the writable ``buffers``, one after the other, with bytes from ``offset`` on."""
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            self._require(offset, view.nbytes)
            view[:] = self._made(offset, view.nbytes)
            offset += view.nbytes

    def close(self) -> None:
        for file in self._sources:
            file.close()

    def _made(self, offset: int, size: int) -> memoryview:
        found = memoryview(self._make(offset, size)).cast("B")
        if found.nbytes != size:
            raise CorruptCheckpoint(
                f"{self} should have {size} bytes from byte {offset} on, but {found.nbytes} came "
                f"out ({self._what}). Fetch or write the checkpoint again."
            )
        return found


def filled(beside: File, name: str, size: int, pattern: bytes, how: str) -> Made:
    """``size`` bytes that repeat ``pattern``; no file is read."""

    def make(offset: int, length: int) -> bytes:
        first = offset % len(pattern)
        return (pattern * (-(-(first + length) // len(pattern))))[first : first + length]

    return Made(beside, name, size, make, how=how)


def in_memory(name: str, size: int, make: Make) -> Made:
    """``size`` bytes that lie in memory, as ``make`` gives them; nothing is on the disk."""
    nowhere = File(Handle(Path("memory"), (0, 0, 0, 0)), name, offset=0, size=0, mtime_ns=0)
    return Made(nowhere, name, size, make, how="taken from memory")
