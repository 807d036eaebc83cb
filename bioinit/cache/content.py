"""The content of files, as one digest that is asked for again and again and computed once.

A file's SHA-256 is remembered with its device, inode, size and times. What was written so shortly
before it was read that another change might leave the same times is not remembered, and is read
again by who asks whether it is still the same. What is written through memory is seen where files
lie on a disk; in memory itself (tmpfs) such writes move no time, and nobody sees them.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bioinit.cache import places
from bioinit.errors import CorruptCheckpoint
from bioinit.storage import disk_error, run_workers, worker_count

_AT_ONCE = 4 * 2**20
RECENT_NS = 2 * 10**9
"""Times of files on some systems are no finer than this."""

Identity = tuple[int, int, int, int, int]
"""Device, inode, size, and the times of the last change of content and of anything."""


class Look(NamedTuple):
    """One file as it was when it was read, and its digest."""

    path: Path
    identity: Identity
    sha256: str
    is_recent: bool


class Content(NamedTuple):
    """What files hold, and how several of them lie from one another; wherever they lie."""

    digest: str
    files: tuple[Look, ...]
    read: int
    """Bytes that had to be read to know it."""

    @property
    def moment(self) -> str:
        """The same only as long as nobody has written any of the files, be it what was there."""
        if any(look.is_recent for look in self.files):  # the next change may leave the same times
            return secrets.token_hex(16)
        said = [[os.fspath(look.path), *look.identity] for look in self.files]
        return hashlib.sha256(json.dumps(said).encode("utf-8", "surrogatepass")).hexdigest()

    def require_unchanged(self) -> None:
        """Look whether all files are still what they were.

        Raises:
            CorruptCheckpoint: one is not.
        """
        again = [look for look in self.files if look.is_recent]
        for look in self.files:
            if _identity(look.path) != look.identity:
                raise _changed(look.path)
        for look, (sha256, _) in zip(again, _hashed([look.path for look in again]), strict=True):
            if sha256 != look.sha256:
                raise _changed(look.path)


def content_of(files: Iterable[Path]) -> Content:
    """The content of ``files``: their bytes, and where they lie from one another.

    Raises:
        StorageError: one cannot be read.
        CorruptCheckpoint: one is being written.
    """
    paths = sorted({Path(os.path.abspath(path)) for path in files})
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    began = time.time_ns()
    identities = [_identity(path) for path in paths]
    memory = _Memory(root)
    known = [memory.sha256(identity) for identity in identities]
    unknown = [path for path, sha256 in zip(paths, known, strict=True) if sha256 is None]
    fresh = dict(zip(unknown, _hashed(unknown), strict=True))
    looks = []
    for path, identity, sha256 in zip(paths, identities, known, strict=True):
        if sha256 is None:
            sha256, seen = fresh[path]
            if seen != identity:
                raise _changed(path)
        is_recent = max(identity[3:]) > began - RECENT_NS
        looks.append(Look(path, identity, sha256, is_recent))
    if unknown:
        memory.remember(look for look in looks if not look.is_recent)
    # Of one file the name says nothing.
    names = [path.relative_to(root).as_posix() if len(paths) > 1 else "" for path in paths]
    said = [[name, look.sha256] for name, look in zip(names, looks, strict=True)]
    digest = hashlib.sha256(json.dumps(said).encode("utf-8", "surrogatepass")).hexdigest()
    return Content(digest, tuple(looks), sum(fresh[path][1][2] for path in unknown))


def is_remembered(files: Iterable[Path]) -> bool:
    """Whether :func:`content_of` would answer without reading any of them."""
    paths = sorted({Path(os.path.abspath(path)) for path in files})
    if not paths:
        return True
    memory = _Memory(Path(os.path.commonpath([path.parent for path in paths])))
    return all(memory.sha256(_identity(path)) is not None for path in paths)


class _Memory:
    """What is remembered of the files of one folder: a file of ours, read and replaced whole.

    Of two processes that write it, one wins; what the other knew is read once more some day.
    """

    def __init__(self, root: Path) -> None:
        try:
            found = os.stat(root)
        except OSError as error:
            raise disk_error(error, f"read {root}") from error
        self._path = places.digests() / f"{found.st_dev:x}-{found.st_ino:x}.json"
        self._known = _read(self._path)

    def sha256(self, identity: Identity) -> str | None:
        return self._known.get(_key(identity))

    def remember(self, looks: Iterable[Look]) -> None:
        """Add ``looks``. A cache that cannot be written forgets, and that is no error."""
        self._known |= {_key(look.identity): look.sha256 for look in looks}
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside = self._path.with_suffix(f".{os.getpid()}.{secrets.token_hex(4)}")
            try:
                beside.write_text(json.dumps(self._known), "utf-8")
                os.replace(beside, self._path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(beside)


def _read(path: Path) -> dict[str, str]:
    try:
        said: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(said, Mapping):
        return {}
    return {key: value for key, value in said.items() if isinstance(value, str)}


def _key(identity: Identity) -> str:
    return " ".join(map(str, identity))


def _identity(path: Path) -> Identity:
    try:
        return _of(os.stat(path))
    except OSError as error:
        raise disk_error(error, f"read {path}") from error


def _of(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hashed(paths: Sequence[Path]) -> list[tuple[str, Identity]]:
    """The digest of each of ``paths``, and what the file was that had it."""
    results: dict[Path, tuple[str, Identity]] = {}
    waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for path in paths:
        waiting.put(path)

    def work(stopped: threading.Event) -> None:
        buffer = bytearray(_AT_ONCE)
        while not stopped.is_set():
            try:
                path = waiting.get_nowait()
            except queue.Empty:
                return
            results[path] = _hash(path, memoryview(buffer), stopped)

    if paths:
        run_workers(work, min(worker_count(), len(paths)))
    return [results[path] for path in paths]


def _hash(path: Path, buffer: memoryview, stopped: threading.Event) -> tuple[str, Identity]:
    found = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            # Who writes through memory that was written before moves no time until that is on
            # the disk; from then on each first write does.
            with suppress(OSError):
                os.fdatasync(file.fileno())
            before = _of(os.fstat(file.fileno()))
            while (size := file.readinto(buffer)) and not stopped.is_set():
                found.update(buffer[:size])
            after = _of(os.fstat(file.fileno()))
    except OSError as error:
        raise disk_error(error, f"read {path}") from error
    if before != after:
        raise _changed(path)
    return found.hexdigest(), after


def _changed(path: Path) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{path} changed while it was being read, so nothing is kept of what was made of it. Wait "
        "until nobody writes it, then start again."
    )
