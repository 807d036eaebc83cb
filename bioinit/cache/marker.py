"""What a kept folder says of itself: what it was made of, and what it holds.

The marker is written last, into a folder that is still hidden; so whatever has one was whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bioinit.storage import MADE_OF, Journal, disk_error
from bioinit.storage.folder import MOST_TEXT, stays_inside

_NOTHING: Mapping[str, str] = {}


class Marker(NamedTuple):
    """The marker of one folder."""

    made_of: dict[str, str]
    about: dict[str, str]
    files: dict[str, tuple[int, str]]
    """Size and SHA-256 of every file, by its path in the folder."""
    made: float
    """When, in seconds since 1970."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for size, _ in self.files.values())


def mark(
    folder: Path,
    made_of: Mapping[str, str],
    about: Mapping[str, str],
    known: Mapping[str, str] = _NOTHING,
) -> None:
    """Write the marker of ``folder``, which holds everything else.

    Args:
        folder: still hidden.
        made_of: what it was made of.
        about: what people are told.
        known: digests that need not be computed again, by file.
    """
    try:
        files = {
            name: (os.stat(folder / name).st_size, known.get(name) or digest_of(folder / name))
            for name in sorted(_files_in(folder))
        }
        said = Marker(dict(made_of), dict(about), files, time.time())
        (folder / MADE_OF).write_text(json.dumps(said._asdict(), indent=1) + "\n", "utf-8")
    except OSError as error:
        raise disk_error(error, f"write {folder / MADE_OF}") from error


def read(folder: Path) -> Marker | None:
    """The marker of ``folder``, or None if it has none that can be used."""
    try:
        # By hand: another process may touch it meanwhile, which is no change.
        with open(folder / MADE_OF, "rb") as file:
            said = json.loads(file.read(MOST_TEXT))
    except (OSError, ValueError, RecursionError):
        return None
    try:
        return _checked(said)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def is_made_of(folder: Path, made_of: Mapping[str, str], *, whole: bool = True) -> bool:
    """Whether ``folder`` was made of ``made_of``; if ``whole``, whether its files are all there.

    That they are is judged by names and sizes: who has doubts asks for their digests.
    """
    found = read(folder)
    if found is None or found.made_of != dict(made_of):
        return False
    return not whole or not any(lacks(folder, found))


def lacks(folder: Path, marker: Marker) -> Iterator[str]:
    """The files that are missing, or have another size."""
    for name, (size, _) in marker.files.items():
        try:
            found = os.lstat(folder / name)
        except OSError:
            yield f"{name} missing"
            continue
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            yield f"{name} changed"


def damage(folder: Path, marker: Marker) -> list[str]:
    """What is not as it was made: files by name, each with what became of it. All are read."""
    wrong = list(lacks(folder, marker))
    told = {entry.rpartition(" ")[0] for entry in wrong}
    for name, (_, digest) in marker.files.items():
        if name not in told and digest_of(folder / name) != digest:
            wrong.append(f"{name} changed")
    wrong += [f"{name} added" for name in sorted(_files_in(folder)) if name not in marker.files]
    return wrong


def used(folder: Path) -> float:
    """When it was asked for the last time, in seconds since 1970."""
    return os.stat(folder / MADE_OF).st_mtime


def touch(folder: Path) -> None:
    """Remember that it was asked for now, if this file system lets us."""
    with suppress(OSError):
        os.utime(folder / MADE_OF)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise disk_error(error, f"read {path}") from error


def _checked(said: Any) -> Marker | None:
    tables = [said[name] for name in ("made_of", "about", "files")]
    if not all(isinstance(table, dict) for table in tables):
        return None
    made_of, about = ({key: str(value) for key, value in t.items()} for t in tables[:2])
    files = {name: (int(size), str(digest)) for name, (size, digest) in tables[2].items()}
    made = float(said["made"])
    is_sound = math.isfinite(made) and all(map(stays_inside, files))
    return Marker(made_of, about, files, made) if is_sound else None


def _files_in(folder: Path) -> Iterator[str]:
    """Every file below ``folder`` that counts, by its path in it."""
    ours = {MADE_OF, Journal.NAME}
    for where, _, names in os.walk(folder):
        for name in names:
            path = (Path(where) / name).relative_to(folder).as_posix()
            if path not in ours:
                yield path
