"""A gzip file as the bytes that come out of it, for reading anywhere: nothing is written.

The format has no index, so opening decompresses the file once from end to end, and keeps the state
of the decompressor every few MiB of what came out (each state holds the last 32 KiB). A read goes
on from the nearest state before it. That pass is the price of the format: as long as `gzip -t`. It
also checks every checksum. Reading in order costs one more such pass, reading backwards one stretch
between two states for each read.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_right
from collections.abc import Generator
from typing import Generic, NoReturn, TypeVar, cast

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage.file import File
from bioinit.storage.made import Made

MAGIC = b"\x1f\x8b"
HOW = "gzip, decompressed while reading"
INPUT_BYTES = 32 * 1024
OUTPUT_BYTES = 256 * 1024
FIRST_STRETCH = 1 << 20
MOST_STATES = 256  # about 45 KiB each
MOST_CURSORS = 8
# Weights hardly shrink and text shrinks to a tenth; what grows more than this was made to.
BOMB_BYTES = 64 << 20
BOMB_RATIO = 200
MOST_TINY_MEMBERS = 1000
TINY_MEMBER_BYTES = 512
_GZIP_WITH_CHECKSUM = 16 + zlib.MAX_WBITS

Found = TypeVar("Found")
Watch = Generator[tuple[int, int], bytes, Found]
"""Yields which bytes of the output it wants next, always further on; fewer come at the end."""


def unpacked(file: File, name: str, watch: Watch[Found]) -> tuple[Made, Found]:
    """What comes out of the gzip ``file``, called ``name``, and what ``watch`` found on the way.

    Whatever has to look at all of the output once (the headers of a tar) watches the pass that
    happens anyway, instead of costing another one.

    Raises:
        CorruptCheckpoint: it is truncated, a checksum is wrong, or something follows it.
        RefusedCheckpoint: it grows so much that it was made to fill the memory.
    """
    stream = _Stream(file)
    states = [stream.copy()]
    stretch = FIRST_STRETCH
    watching = _Watching(watch)
    while data := stream.more(OUTPUT_BYTES):
        watching.see(stream.produced - len(data), data)
        if stream.produced > max(BOMB_BYTES, BOMB_RATIO * stream.consumed):
            raise RefusedCheckpoint(
                f"{file} grows from {stream.consumed} to more than {stream.produced} bytes, which "
                "no checkpoint does. Get it from a source you trust; if it is that one, unpack it."
            )
        if stream.produced - states[-1].produced >= stretch:
            states.append(stream.copy())
            if len(states) > MOST_STATES:
                states = states[::2]
                stretch *= 2
    found = watching.end()
    made = Made(file, name, stream.produced, _Cursors(states).read, sources=(file,), how=HOW)
    return made, found


class _Watching(Generic[Found]):
    """Gives a watcher the bytes it wants, as they pass by."""

    def __init__(self, watch: Watch[Found]) -> None:
        self._watch = watch
        self._held = bytearray()
        self._at = self._missing = 0
        self._found: Found | None = None
        self._is_done = False
        self._send(None)

    def see(self, position: int, data: bytes) -> None:
        """Look at ``data``, which begins at ``position`` of the output."""
        while not self._is_done and self._at < position + len(data):
            start = self._at - position
            part = data[start : start + self._missing]
            self._held += part
            self._at += len(part)
            self._missing -= len(part)
            if not self._missing:
                self._send(bytes(self._held))

    def end(self) -> Found:
        """Nothing more comes; what the watcher found."""
        while not self._is_done:
            self._send(bytes(self._held))
        return cast(Found, self._found)

    def _send(self, data: bytes | None) -> None:
        self._held.clear()
        try:
            wanted = next(self._watch) if data is None else self._watch.send(data)
        except StopIteration as done:
            self._found, self._is_done = done.value, True
        else:
            self._at, self._missing = wanted


class _Stream:
    """A place in a gzip file, and the decompressor that stands there."""

    __slots__ = ("_file", "_inflater", "_is_fresh", "_members", "_position", "_tail", "produced")

    def __init__(self, file: File) -> None:
        self._file = file
        self._inflater = zlib.decompressobj(_GZIP_WITH_CHECKSUM)
        self._tail = b""
        self._position = 0
        self._members = 0
        self._is_fresh = True
        self.produced = 0

    def copy(self) -> _Stream:
        other = _Stream.__new__(_Stream)
        for slot in self.__slots__:
            setattr(other, slot, getattr(self, slot))
        other._inflater = self._inflater.copy()
        return other

    @property
    def consumed(self) -> int:
        return self._position - len(self._tail)

    def more(self, most: int) -> bytes:
        """The next bytes, at least one and at most ``most``; none at the end of the file."""
        while True:
            if not self._tail:
                size = min(INPUT_BYTES, self._file.size - self._position)
                self._tail = self._file.read(self._position, size)
                self._position += size
            if self._is_fresh:
                self._tail = self._tail.lstrip(b"\0") if self._members else self._tail
                if not self._tail:
                    if self._position == self._file.size:
                        return b""
                    continue
                self._is_fresh = False
            is_last = not self._tail
            data = self._inflated(most)
            if self._inflater.eof:
                self._begin_member()
            if data:
                self.produced += len(data)
                return data
            if is_last and not self._is_fresh:
                self._corrupt("it ends in the middle of the compressed data: it is truncated")

    def _inflated(self, most: int) -> bytes:
        try:
            data = self._inflater.decompress(self._tail, most)
        except zlib.error as error:
            if self._members and "header" in str(error):
                self._corrupt(f"something else follows the compressed data before {self._position}")
            self._corrupt(f"before byte {self._position}, zlib says: {error}")
        self._tail = self._inflater.unconsumed_tail
        return data

    def _begin_member(self) -> None:
        """Several gzip files one after the other are one; zeros may fill up after the last."""
        self._tail = self._inflater.unused_data
        self._inflater = zlib.decompressobj(_GZIP_WITH_CHECKSUM)
        self._is_fresh = True
        self._members += 1
        if self._members > MOST_TINY_MEMBERS and self.consumed < self._members * TINY_MEMBER_BYTES:
            self._corrupt(f"it consists of {self._members} gzip files in {self.consumed} bytes")

    def _corrupt(self, what: str) -> NoReturn:
        raise CorruptCheckpoint(f"{self._file} is damaged: {what}. Fetch or write it again.")


class _Cursors:
    """Streams that were read from, ready to go on, and the states to begin at.

    A read takes a stream out of here and puts it back, so that several threads read at once and
    each goes on where one of them stopped.
    """

    def __init__(self, states: list[_Stream]) -> None:
        self._states = states
        self._idle: list[_Stream] = []
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytearray:
        """Exactly those bytes of the output."""
        data = bytearray(size)
        if not size:
            return data
        stream = self._take(offset)
        while stream.produced < offset:
            self._next(stream, min(OUTPUT_BYTES, offset - stream.produced))
        filled = 0
        while filled < size:
            part = self._next(stream, min(OUTPUT_BYTES, size - filled))
            data[filled : filled + len(part)] = part
            filled += len(part)
        with self._lock:
            self._idle.append(stream)
            del self._idle[:-MOST_CURSORS]
        return data

    def _take(self, offset: int) -> _Stream:
        """The stream that stands nearest before ``offset``; nobody else has it."""
        number = bisect_right(self._states, offset, key=lambda state: state.produced)
        state = self._states[number - 1]
        with self._lock:
            behind = [s for s in self._idle if state.produced <= s.produced <= offset]
            if behind:
                nearest = max(behind, key=lambda s: s.produced)
                self._idle.remove(nearest)
                return nearest
        return state.copy()

    def _next(self, stream: _Stream, most: int) -> bytes:
        data = stream.more(most)
        if not data:
            stream._corrupt("less came out of it than when it was opened")
        return data
