"""Files, windows of files and folders of them, for reading.

A :class:`File` knows its size from the start, is opened at the first byte that is asked for, and
counts what it was asked for. It is read with ``preadv``, never mapped: page faults on a mapped
weight file cost more than the copy. A :class:`Folder` is a directory, or a single file presented as
a folder of one, so that a reader never cares which of the two a person pointed at.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint, StorageError

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
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ENOTDIR: "Check the path: a part of it is a file.",
    errno.EIO: "The disk or the network behind it failed: try again, then check the device.",
}


def disk_error(error: OSError, doing: str) -> StorageError:
    """``error`` as a :class:`StorageError`: what was being done, what the system said, the cure."""
    reason = os.strerror(error.errno).lower() if error.errno else str(error)
    cure = _CURES.get(error.errno or 0, "Check the file system.")
    return StorageError(f"cannot {doing}: {reason}. {cure}")


class _Handle:
    """One file of the disk, shared by all its windows: its descriptor, and what was read."""

    __slots__ = ("bytes_read", "descriptor", "lock", "opened", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = -1
        self.opened = 0
        self.bytes_read = 0
        self.lock = threading.Lock()

    def fileno(self) -> int:
        if self.descriptor < 0:
            with self.lock:
                if self.descriptor < 0:
                    try:
                        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                    except OSError as error:
                        raise disk_error(error, f"open {self.path}") from error
                    self.opened += 1
        return self.descriptor

    def close(self) -> None:
        with self.lock:
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1


class File:
    """A file, or a window of one: ``size`` bytes that begin at byte ``offset`` of ``path``.

    ``name`` is how the folder it came from calls it. All offsets given to it count from the start
    of the window.
    """

    __slots__ = ("_handle", "mtime_ns", "name", "offset", "path", "size")

    def __init__(
        self, handle: _Handle, name: str, *, offset: int, size: int, mtime_ns: int
    ) -> None:
        self._handle = handle
        self.path = handle.path
        self.name = name
        self.offset = offset
        self.size = size
        self.mtime_ns = mtime_ns

    @classmethod
    def at(cls, path: str | Path, name: str | None = None) -> Self:
        """The whole file at ``path``; it is looked up, but not opened."""
        path = Path(path)
        try:
            found = os.stat(path)
        except OSError as error:
            raise disk_error(error, f"read {path}") from error
        if not stat.S_ISREG(found.st_mode):
            raise StorageError(f"cannot read {path}: it is not a regular file. Check the path.")
        return cls(
            _Handle(path),
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
            return str(self.path)
        return f"{self.path} ({self.name})"

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
        """The descriptor, opened now if it was not. Byte 0 of the window is at ``offset``."""
        return self._handle.fileno()

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset`` on.

        Raises:
            CorruptCheckpoint: the file ends before that.
            StorageError: the file system refused.
        """
        self._require(offset, size)
        buffer = bytearray(size)
        self.read_into(offset, (buffer,))
        return bytes(buffer)

    def read_into(self, offset: int, buffers: Sequence[Any]) -> None:
        """Fill the writable ``buffers``, one after the other, with the bytes from ``offset`` on.

        One system call where the kernel allows; Python's lock is released meanwhile, so threads
        read in parallel.

        Raises:
            CorruptCheckpoint: the file ends before the buffers are full.
            StorageError: the file system refused.
        """
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        total = sum(view.nbytes for view in views)
        self._require(offset, total)
        descriptor, position, index = self._handle.fileno(), self.offset + offset, 0
        end = position + total
        while position < end:
            try:
                got = os.preadv(descriptor, _next_call(views, index), position)
            except OSError as error:
                raise disk_error(error, f"read {self}") from error
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
        with self._handle.lock:
            self._handle.bytes_read += total

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


class Folder:
    """A directory, or a single file as a folder of one. Names in it are relative, with ``/``."""

    def __init__(self, path: Path, *, only: str | None = None) -> None:
        self.path = path
        self._only = only
        self._entries: dict[str, bool] | None = None
        self._files: dict[str, File] = {}

    @classmethod
    def at(cls, path: str | Path) -> Self:
        """The folder at ``path``.

        Raises:
            StorageError: there is nothing, or nothing that can be looked into.
        """
        absolute = Path(os.path.abspath(os.path.expanduser(path)))
        try:
            mode = os.stat(absolute).st_mode
        except OSError as error:
            raise disk_error(error, f"read {absolute}") from error
        if stat.S_ISDIR(mode):
            return cls(absolute)
        if stat.S_ISREG(mode):
            return cls(absolute, only=absolute.name)
        raise StorageError(
            f"cannot read {absolute}: it is neither a file nor a directory. Check the path."
        )

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_file(self) -> bool:
        """Whether a person pointed at a single file."""
        return self._only is not None

    @property
    def around(self) -> Folder | None:
        """The directory a single file lies in; None for a directory."""
        return Folder(self.path.parent) if self.is_file else None

    def names(self, *, deep: bool = False) -> tuple[str, ...]:
        """Names of the files here, sorted; with ``deep`` those of all inner folders too."""
        here = [name for name, is_folder in self._listing().items() if not is_folder]
        if deep:
            for inner in self.folders():
                here.extend(f"{inner}/{name}" for name in self.folder(inner).names(deep=True))
        return tuple(sorted(here))

    def folders(self) -> tuple[str, ...]:
        """Names of the inner folders, sorted."""
        return tuple(sorted(name for name, is_folder in self._listing().items() if is_folder))

    def has(self, name: str) -> bool:
        """Whether there is a file of that name. Names that lead out of the folder are not here."""
        if not _stays_inside(name):
            return False
        if "/" not in name:
            return self._listing().get(name) is False
        return not self.is_file and (self.path / name).is_file()

    def file(self, name: str) -> File:
        """The file called ``name``; the same object for the same name.

        Raises:
            RefusedCheckpoint: the name leads out of this folder.
            StorageError: there is no such file.
        """
        found = self._files.get(name)
        if found is None:
            if not _stays_inside(name):
                raise RefusedCheckpoint(
                    f"{self.path} names the file {name!r}, which leads out of the checkpoint. "
                    "Only plain relative names are followed: get the checkpoint from a source you "
                    "trust, or correct the name."
                )
            if self.is_file and name != self._only:
                raise StorageError(f"cannot read {self.path}/{name}: {self.path} is a file.")
            found = File.at(self.path if self.is_file else self.path / name, name)
            self._files[name] = found
        return found

    def folder(self, name: str) -> Folder:
        """The inner folder called ``name``."""
        if not _stays_inside(name) or self.is_file or not (self.path / name).is_dir():
            raise StorageError(f"{self.path} has no folder {name!r}. Check the path.")
        return Folder(self.path / name)

    def lone(self, name: str) -> Folder:
        """The file called ``name`` as a folder of one, sharing its descriptor with this folder."""
        file = self.file(name)
        alone = Folder(file.path, only=file.path.name)
        alone._files[file.path.name] = file
        return alone

    def read_text(self, name: str) -> str:
        """The text of a file.

        Raises:
            CorruptCheckpoint: it is not UTF-8.
        """
        file = self.file(name)
        try:
            return file.read(0, file.size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint(
                f"{file} is not UTF-8 text: {error.reason} at byte {error.start}. Fetch or write "
                "it again."
            ) from error

    def read_json(self, name: str) -> Any:
        """The value of a JSON file.

        Raises:
            CorruptCheckpoint: it is not JSON, or an object in it has the same key twice.
        """
        text = self.read_text(name)
        try:
            return json.loads(text, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpoint(
                f"{self.file(name)} is not usable JSON: {error}. Fetch or write it again."
            ) from error

    def seen(self) -> Iterator[File]:
        """The files that were asked for so far."""
        return iter(tuple(self._files.values()))

    def close(self) -> None:
        """Close every file that was asked for."""
        for file in self._files.values():
            file.close()

    def _listing(self) -> dict[str, bool]:
        """Name of every entry, and whether it is a folder. Anything else is not listed."""
        if self._entries is None:
            if self._only is not None:
                self._entries = {self._only: False}
            else:
                try:
                    with os.scandir(self.path) as entries:
                        kinds = [(entry.name, entry.is_dir(), entry.is_file()) for entry in entries]
                except OSError as error:
                    raise disk_error(error, f"list {self.path}") from error
                self._entries = {
                    name: is_dir for name, is_dir, is_file in kinds if is_dir or is_file
                }
        return self._entries


def _stays_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    plain = "/".join(parts) == name and "\0" not in name
    return plain and bool(parts) and not name.startswith("/") and ".." not in parts


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found
