"""A file, or a window of one, for reading.

It knows its size from the start, is opened at the first byte that is asked for, and counts what it
was asked for. It is read with ``preadv``, never mapped: page faults on a mapped weight file cost
more than the copy.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from bioinit.errors import CorruptCheckpoint, StorageError
from bioinit.storage.handle import Handle, identity_of
from bioinit.storage.shown import shown

MOST_BUFFERS_PER_READ = 1024  # IOV_MAX of Linux
MOST_BYTES_PER_READ = 1 << 30  # the kernel stops a little below 2 GiB

_CURES = {
    errno.ENOENT: "Check the path.",
    errno.EACCES: "Ask its owner for permission, or choose another path.",
    errno.EPERM: "Ask its owner for permission, or choose another path.",
    errno.EROFS: "Choose a path on a file system that can be written.",
    errno.ENOSPC: "Free some space, or choose another path.",
    errno.EDQUOT: "Free some of your quota, or choose another path.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or choose another file system.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.EBUSY: "Choose a folder inside it: it is in use, or the root of a mounted disk.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ENOTDIR: "Check the path: a part of it is a file.",
    errno.EIO: "The disk or the network behind it failed: try again, then check the device.",
}


def disk_error(error: OSError, doing: str) -> StorageError:
    """``error`` as a :class:`StorageError`: what was being done, what the system said, the cure."""
    reason = os.strerror(error.errno).lower() if error.errno else str(error)
    cure = _CURES.get(error.errno or 0, "Check the file system.")
    return StorageError(f"cannot {shown(doing)}: {reason}. {cure}")


class File:
    """A file, or a window of one: ``size`` bytes that begin at byte ``offset`` of ``path``.

    ``name`` is how the folder it came from calls it. All offsets given to it count from the start
    of the window.
    """

    __slots__ = ("_handle", "mtime_ns", "name", "offset", "path", "size")

    def __init__(self, handle: Handle, name: str, *, offset: int, size: int, mtime_ns: int) -> None:
        self._handle = handle
        self.path = handle.path
        self.name = name
        self.offset = offset
        self.size = size
        self.mtime_ns = mtime_ns

    @classmethod
    def at(cls, path: str | Path, name: str | None = None) -> Self:
        """The whole file at ``path``; it is looked up, but not opened."""
        path = path if isinstance(path, Path) else Path(path)  # parsing it again takes longer
        try:
            found = os.stat(path)
        except OSError as error:
            raise disk_error(error, f"read {path}") from error
        if not stat.S_ISREG(found.st_mode):
            raise StorageError(
                f"cannot read {shown(path)}: it is not a regular file. Check the path."
            )
        return cls(
            Handle(path, identity_of(found)),
            path.name if name is None else name,
            offset=0,
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
        )

    def __repr__(self) -> str:
        return f"File({str(self)!r}, size={self.size})"

    def __str__(self) -> str:
        """The path, and inside it the member that the window shows."""
        if self.path.as_posix().endswith(self.name):
            return shown(self.path)
        return shown(f"{self.path} ({self.name})")

    @property
    def how(self) -> str | None:
        """What is done to have these bytes, where no file holds them as they are; else None."""
        return None

    @property
    def remarks(self) -> list[str]:
        """What reading found that people should know: sentences, none for a plain file."""
        return []

    @property
    def opened(self) -> int:
        """How often the file behind this window was opened."""
        return self._handle.opened

    @property
    def bytes_read(self) -> int:
        """How many bytes of the file behind this window were read, through any of its windows."""
        return self._handle.bytes_read

    def window(self, name: str, offset: int, size: int) -> File:
        """The ``size`` bytes from ``offset`` on, as a file of their own on the same descriptor."""
        self._require(offset, size)
        return File(
            self._handle, name, offset=self.offset + offset, size=size, mtime_ns=self.mtime_ns
        )

    def fileno(self) -> int:
        """The descriptor, which stays open until the file is closed or forgotten.

        Byte 0 of the window is at ``offset``. For code that cannot be given bytes: what is read
        through :meth:`read` and :meth:`read_into` may be closed in between.
        """
        try:
            return self._handle.keep()
        except OSError as error:
            raise disk_error(error, f"open {self.path}") from error

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset`` on.

        Raises:
            CorruptCheckpoint: the file ends before that, or is another one now, or these are more
                bytes than fit into memory.
            StorageError: the file system refused.
        """
        self._require(offset, size)
        descriptor, done = self._acquire(), 0
        try:
            data = os.pread(descriptor, size, self.offset + offset)
            if len(data) == size:
                done = size
                return data
            buffer = bytearray(size)
        except OSError as error:
            raise disk_error(error, f"read {self}") from error
        except (MemoryError, OverflowError) as error:
            raise CorruptCheckpoint(
                f"{self} has {self.size} bytes, and {size} of them, which are read in one go, do "
                "not fit into memory. Check that it is the file that is meant, or fetch it again."
            ) from error
        finally:
            self._handle.release(done)
        self.read_into(offset, (buffer,))
        return bytes(buffer)

    def read_into(self, offset: int, buffers: Sequence[Any]) -> None:
        """Fill the writable ``buffers``, one after the other, with the bytes from ``offset`` on.

        One system call where the kernel allows; Python's lock is released meanwhile, so threads
        read in parallel.

        Raises:
            CorruptCheckpoint: the file ends before the buffers are full, or is another one now.
            StorageError: the file system refused.
        """
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        total = sum(view.nbytes for view in views)
        self._require(offset, total)
        descriptor, done = self._acquire(), 0
        try:
            self._scatter(descriptor, offset, total, views)
            done = total
        except OSError as error:
            raise disk_error(error, f"read {self}") from error
        finally:
            self._handle.release(done)

    def _scatter(self, descriptor: int, offset: int, total: int, views: list[memoryview]) -> None:
        position, index = self.offset + offset, 0
        end = position + total
        while position < end:
            got = os.preadv(descriptor, _next_call(views, index), position)
            if got == 0:
                raise CorruptCheckpoint(
                    f"{self} ends at byte {position - self.offset}, but {total} bytes were wanted "
                    f"from byte {offset} on: it got shorter since it was opened. Fetch it again."
                )
            position += got
            while got:
                if got < views[index].nbytes:
                    views[index] = views[index][got:]
                    break
                got -= views[index].nbytes
                index += 1

    def _acquire(self) -> int:
        try:
            return self._handle.acquire()
        except OSError as error:
            raise disk_error(error, f"open {self.path}") from error

    def close(self) -> None:
        """Give the descriptor back; the next read opens the file again."""
        self._handle.close()

    def _require(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CorruptCheckpoint(
                f"{self} has {self.size} bytes, but {size} bytes were wanted from byte {offset} "
                "on: it is truncated, or what points there is wrong. Fetch or write it again."
            )


def _next_call(views: list[memoryview], index: int) -> list[memoryview]:
    """The views one ``preadv`` may fill, from ``index`` on."""
    if len(views) == 1 and views[0].nbytes <= MOST_BYTES_PER_READ:
        return views
    chosen: list[memoryview] = []
    room = MOST_BYTES_PER_READ
    for view in views[index : index + MOST_BUFFERS_PER_READ]:
        if view.nbytes >= room:
            chosen.append(view[:room])
            break
        chosen.append(view)
        room -= view.nbytes
    return chosen


def identity(path: Path) -> tuple[int, int] | None:
    """What two paths to the same directory have in common; None where nothing lies on the disk."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
