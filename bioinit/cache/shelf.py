"""What the cache holds: listed, verified, and removed where nobody uses it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bioinit.cache import marker, places, use
from bioinit.errors import StorageError
from bioinit.storage import disk_error
from bioinit.storage.lock import try_lock

_LEFT = re.compile(r"\.([0-9a-f]+)(\.\d+\.[0-9a-f]{8})?\.(converting|partial|old)")
_LOCK = re.compile(r"\.[0-9a-f]+\.(use|turn|lock)")
_KEY = re.compile(r"[0-9a-f]+")

State = Literal["whole", "damaged", "unfinished"]


class Kept(NamedTuple):
    """One folder of the cache."""

    path: Path
    key: str
    state: State
    """``whole`` as names and sizes tell; ``unfinished`` is what a killed process left."""
    bytes: int
    used: float
    """When it was asked for the last time, in seconds since 1970."""
    made: float
    about: dict[str, str]
    made_of: dict[str, str]
    in_use: bool
    """Whether some process uses it now, or is making it."""

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "path": str(self.path)}


class Removed(NamedTuple):
    """What :func:`prune` did."""

    removed: tuple[Kept, ...]
    spared: tuple[Kept, ...]
    """What would have gone, and is in use."""


def entries() -> list[Kept]:
    """Everything that the cache holds, what was asked for last first."""
    found = [kept for name in _names() if (kept := _entry(places.made() / name)) is not None]
    return sorted(found, key=lambda kept: (-kept.used, kept.key))


def verify(kept: Kept) -> list[str]:
    """Read every file of ``kept``; what is not as it was made, by name."""
    said = marker.read(kept.path)
    if said is None:
        return ["it says of no file what it should hold"]
    return marker.damage(kept.path, said)


def prune(
    *,
    keys: Collection[str] = (),
    older_than: float | None = None,
    most: int | None = None,
    everything: bool = False,
) -> Removed:
    """Remove what nobody uses: what is damaged or unfinished, and what is said here.

    Args:
        keys: these, and nothing else.
        older_than: seconds since it was asked for the last time.
        most: bytes that may stay; what was not asked for the longest time goes first.
        everything: all of it.

    Raises:
        StorageError: something cannot be removed.
    """
    now = time.time()
    held = entries()
    total = sum(kept.bytes for kept in held)
    removed: list[Kept] = []
    spared: list[Kept] = []
    failed: StorageError | None = None
    for kept in sorted(held, key=lambda kept: (kept.state == "whole", kept.used)):
        is_old = older_than is not None and now - kept.used > older_than
        is_much = most is not None and total > most
        is_asked = everything or is_old or is_much or kept.state != "whole"
        if not (kept.key in keys if keys else is_asked):
            continue
        try:
            done = _remove(kept)
        except StorageError as error:  # what else is to go is no worse for it
            failed = failed or error
            continue
        if done:
            removed.append(kept)
            total -= kept.bytes
        else:
            spared.append(kept)
    if not keys:
        _tidy(now, older_than, everything)
    if failed is not None:
        raise failed
    return Removed(tuple(removed), tuple(spared))


def _names() -> list[str]:
    try:
        return sorted(os.listdir(places.made()))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk_error(error, f"list {places.made()}") from error


def _entry(path: Path) -> Kept | None:
    """What lies at ``path``, if it is a folder of the cache and still there."""
    left = _LEFT.fullmatch(path.name)
    if not os.path.isdir(path) or not (left or _KEY.fullmatch(path.name)):
        return None
    key = left[1] if left else path.name
    said = None if left else marker.read(path)
    state: State = "unfinished" if left else "damaged"
    try:
        if said is not None:
            state = "damaged" if any(marker.lacks(path, said)) else "whole"
        size, newest = _weighed(path)
        used = newest if said is None else marker.used(path)
    except OSError:  # removed, or renamed, just now
        return None
    made = newest if said is None else said.made
    about, made_of = ({}, {}) if said is None else (said.about, said.made_of)
    return Kept(path, key, state, size, used, made, about, made_of, _is_used(key))


def _weighed(folder: Path) -> tuple[int, float]:
    """Bytes of all files, and the time of the newest of them."""
    size, newest = 0, os.stat(folder).st_mtime
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # one that is being made changes
                found = os.lstat(os.path.join(where, name))
                size, newest = size + found.st_size, max(newest, found.st_mtime)
    return size, newest


def _is_used(key: str) -> bool:
    final = places.made() / key
    if not os.path.lexists(use.lock_of(final)):
        return False
    alone = try_lock(use.lock_of(final))
    if alone is None:
        return True
    os.close(alone)
    return False


def _remove(kept: Kept) -> bool:
    """Take ``kept`` away, unless a process uses it, or has made it again since it was looked at."""
    final = places.made() / kept.key
    alone = try_lock(use.lock_of(final))
    if alone is None:
        return False
    found = _entry(kept.path)
    if found is not None and found.state != kept.state:
        os.close(alone)
        return False
    try:
        # Under another name first: it is gone at once, and a kill leaves nothing that looks whole.
        going = kept.path
        if going == final:
            going = final.parent / f".{kept.key}.{os.getpid()}.{secrets.token_hex(4)}.partial"
            os.rename(final, going)
        if os.path.islink(going):  # what somebody moved to another disk is theirs
            os.unlink(going)
        else:
            shutil.rmtree(going)
    except FileNotFoundError:
        pass  # somebody else took it
    except OSError as error:
        os.close(alone)
        raise disk_error(error, f"remove {kept.path}") from error
    use.forget(final, alone)
    return True


def _tidy(now: float, older_than: float | None, everything: bool) -> None:
    """Remove locks that nobody has, and digests that nobody asked for."""
    for name in _names():
        if _LOCK.fullmatch(name) is None:
            continue
        alone = try_lock(places.made() / name)
        if alone is not None:
            with suppress(OSError):
                os.unlink(places.made() / name)
            os.close(alone)
    for path in _remembered():
        with suppress(OSError):
            is_old = older_than is not None and now - path.stat().st_mtime > older_than
            if everything or is_old:
                path.unlink()


def _remembered() -> Iterator[Path]:
    with suppress(OSError):
        yield from places.digests().iterdir()
