"""Folders of files, for reading: a directory, a single file as a folder of one, or an archive.

A reader that is given a :class:`Folder` never cares which of them a person pointed at. Names that a
checkpoint gives are followed only inside the folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint, StorageError
from bioinit.storage.file import File, disk_error
from bioinit.storage.shown import shown

LONGEST_SHOWN = 100
DEEPEST_JSON = 100
MOST_TEXT = 64 << 20
SMALL_TEXT = 1 << 20
LETTERS_PER_CONTAINER, MORE_CONTAINERS = 64, 10_000
LETTERS_PER_ENTRY, MORE_ENTRIES = 16, 50_000
_LEADS_NOWHERE = (errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES)
_NO_NAMES = frozenset(("", ".", ".."))


class Folder:
    """A directory, a single file as a folder of one, or the members of an archive.

    Names in it are relative, with ``/``. ``path`` is for messages: in an archive nothing lies
    there.
    """

    def __init__(
        self,
        path: Path,
        *,
        only: str | None = None,
        members: Mapping[str, File] | None = None,
        asked: dict[Path, File] | None = None,
    ) -> None:
        self.path = path
        self._only = only
        self._members = members
        self._inner: dict[str, dict[str, File]] | None = None
        self._entries: dict[str, bool] | None = None
        self._files: dict[str, File] = {}
        self._asked: dict[Path, File] = {} if asked is None else asked

    @classmethod
    def at(cls, path: str | Path) -> Self:
        """The folder at ``path``.

        Raises:
            StorageError: there is nothing, or nothing that can be looked into.
        """
        absolute = Path(os.path.abspath(os.path.expanduser(path)))
        try:
            mode = os.stat(absolute).st_mode
        except FileNotFoundError as error:
            left = leftovers(absolute)
            if not left:
                raise disk_error(error, f"read {absolute}") from error
            raise StorageError(
                f"cannot read {absolute}: no such file or directory, but a process that was "
                f"stopped while it wrote it left {left[0].name!r} beside it. A folder that ends in "
                "'.old' is the whole of what stood there before: rename it back, or write again."
            ) from error
        except OSError as error:
            raise disk_error(error, f"read {absolute}") from error
        except ValueError as error:  # a NUL byte, or half of a character
            raise StorageError(
                f"cannot read {str(absolute)!r}: a path cannot hold such characters. Check the "
                "path."
            ) from error
        if stat.S_ISDIR(mode):
            return cls(absolute)
        if stat.S_ISREG(mode):
            return cls(absolute, only=absolute.name)
        raise StorageError(
            f"cannot read {absolute}: it is neither a file nor a directory. Check the path."
        )

    @classmethod
    def over(cls, path: Path, members: Mapping[str, File]) -> Self:
        """The ``members`` of the archive at ``path``, by their names in it, as a folder.

        Names are relative and plain; no name is both a file and the folder of another.
        """
        return cls(path, members=members)

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r})"

    def __str__(self) -> str:
        return shown(self.path)

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
    def asked(self) -> tuple[File, ...]:
        """Every file that was asked for here, or in a folder that this one led to."""
        return tuple(self._asked.values())

    @property
    def is_file(self) -> bool:
        """Whether a person pointed at a single file."""
        return self._only is not None

    @property
    def around(self) -> Folder | None:
        """The directory a single file lies in; None for a directory, and inside an archive."""
        alone = self.is_file and self._members is None
        return Folder(self.path.parent, asked=self._asked) if alone else None

    @property
    def parent(self) -> Folder | None:
        """The directory above this one; None for what has none, and inside an archive."""
        if self._members is not None or self.path.parent == self.path:
            return None
        return Folder(self.path.parent, asked=self._asked)

    def has_sibling(self, name: str) -> bool:
        """Whether something called ``name`` lies beside this directory."""
        return self._members is None and os.path.lexists(self.path.parent / name)

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
        if not stays_inside(name):
            return False
        if "/" not in name:
            return self._listing().get(name) is False
        if self._members is not None:
            return name in self._members
        if self.is_file:
            return False
        try:
            return stat.S_ISREG(os.stat(self.path / name).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise disk_error(error, f"look at {self.path}/{name:.{LONGEST_SHOWN}}") from error

    def file(self, name: str) -> File:
        """The file called ``name``; the same object for the same name.

        Raises:
            RefusedCheckpoint: the name leads out of this folder.
            StorageError: there is no such file.
        """
        found = self._files.get(name)
        if found is None:
            self.require_inside(name)
            if self._members is not None:
                return self._member(name)
            if self.is_file and name != self._only:
                raise StorageError(f"cannot read {self}/{shown(name)}: {self} is a file.")
            found = File.at(self.path if self.is_file else self.path / name, name)
            self._files[name] = found
            self._asked.setdefault(found.path, found)  # the first look counts
        return found

    def require_inside(self, name: str) -> None:
        """Refuse a ``name`` that a checkpoint gave, if it leads out of this folder."""
        if not stays_inside(name):
            raise RefusedCheckpoint(
                f"the checkpoint at {self} names the file {name!r:.200}, which leads out "
                "of it. Only plain relative names are followed: get the checkpoint from a source "
                "you trust, or correct the name."
            )

    def _member(self, name: str) -> File:
        found = (self._members or {}).get(name)
        if found is None:
            raise StorageError(f"cannot read {self}/{shown(name)}: the archive has no such member.")
        return found

    def folder(self, name: str) -> Folder:
        """The inner folder called ``name``."""
        if self._members is not None:
            first, _, rest = name.partition("/")
            members = self._members_by_folder().get(first)
            if members is None:
                raise StorageError(f"{self} has no folder {name!r}. Check the path.")
            inner = Folder(self.path / first, members=members, asked=self._asked)
            return inner.folder(rest) if rest else inner
        if not stays_inside(name) or self.is_file or not os.path.isdir(self.path / name):
            raise StorageError(f"{self} has no folder {name!r}. Check the path.")
        return Folder(self.path / name, asked=self._asked)

    def _members_by_folder(self) -> dict[str, dict[str, File]]:
        """Members below each inner folder; once for all, or many folders would be quadratic."""
        if self._inner is None:
            self._inner = {}
            for name, file in (self._members or {}).items():
                first, slash, rest = name.partition("/")
                if slash:
                    self._inner.setdefault(first, {})[rest] = file
        return self._inner

    def lone(self, name: str) -> Folder:
        """The file called ``name`` as a folder of one, sharing its descriptor with this folder."""
        file = self.file(name)
        if self._members is not None:
            return Folder(self.path / name, only=name, members={name: file}, asked=self._asked)
        alone = Folder(file.path, only=file.path.name, asked=self._asked)
        alone._files[file.path.name] = file
        return alone

    def read_text(self, name: str, *, most: int = MOST_TEXT) -> str:
        """The text of a file of at most ``most`` bytes.

        Raises:
            CorruptCheckpoint: it is larger, or not UTF-8.
        """
        file = self.file(name)
        if file.size > most:
            raise CorruptCheckpoint(
                f"{file} has {file.size} bytes, and such a file has {most} at the most. Check that "
                "it is the file that is meant, or fetch it again."
            )
        try:
            return file.read(0, file.size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint(
                f"{file} is not UTF-8 text: {error.reason} at byte {error.start}. Fetch or write "
                "it again."
            ) from error

    def read_json(self, name: str, *, most: int = MOST_TEXT) -> Any:
        """The value of a JSON file of at most ``most`` bytes.

        Raises:
            CorruptCheckpoint: it is larger or not JSON, an object in it has the same key twice, or
                it would take far more memory than it is long.
        """
        text = self.read_text(name, most=most)
        try:
            containers = text.count("[") + text.count("{")
            if len(text) > SMALL_TEXT:
                _require_sparse(text, containers)
            value = json.loads(text, object_pairs_hook=_without_duplicates)
            if containers > DEEPEST_JSON:
                _require_shallow(value)
            return value
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpoint(
                f"{self.file(name)} is not usable JSON: {error}. Fetch or write it again."
            ) from error

    def close(self) -> None:
        """Close every file that was asked for."""
        for file in (*self._files.values(), *(self._members or {}).values()):
            file.close()

    def _listing(self) -> dict[str, bool]:
        """Name of every entry, and whether it is a folder. Anything else is not listed."""
        if self._entries is None:
            if self._only is not None:
                self._entries = {self._only: False}
            elif self._members is not None:
                split = (name.partition("/") for name in self._members)
                self._entries = {first: bool(slash) for first, slash, _ in split}
            else:
                try:
                    with os.scandir(self.path) as entries:
                        kinds = [(entry.name, *_kind(entry)) for entry in entries]
                except OSError as error:
                    raise disk_error(error, f"list {self.path}") from error
                self._entries = {
                    name: is_dir for name, is_dir, is_file in kinds if is_dir or is_file
                }
        return self._entries


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether it is a folder, and whether it is a file; a link that leads nowhere is neither."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError as error:
        if error.errno not in _LEADS_NOWHERE:
            raise
        return False, False


def stays_inside(name: str) -> bool:
    """Whether ``name`` is a plain relative path that leads out of no folder."""
    # By hand: a path object for each of thousands of chunks would take half the time of opening.
    parts = name.split("/")
    return "\0" not in name and not _NO_NAMES & set(parts) and (name.isascii() or _has_bytes(name))


def _has_bytes(name: str) -> bool:
    """Whether a file can have this name: JSON can spell halves of characters, a disk cannot."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def leftovers(path: Path) -> list[Path]:
    """Hidden folders beside ``path`` that a writer of it left; whole old ones come first."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+\.[0-9a-f]{{8}}\.(old|partial)")
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    found = [path.parent / name for name in names if pattern.fullmatch(name)]
    return sorted(found, key=lambda one: (one.suffix != ".old", one.name))


def _require_sparse(text: str, containers: int) -> None:
    """Raise if a large text spells more values than any index of weights; strings count along."""
    most = len(text) // LETTERS_PER_CONTAINER + MORE_CONTAINERS
    if containers > most:
        raise ValueError(f"it spells {containers} lists and objects in {len(text)} characters")
    if text.count(",") > len(text) // LETTERS_PER_ENTRY + MORE_ENTRIES:
        raise ValueError(f"it spells {text.count(',')} values in {len(text)} characters")


def _require_shallow(value: Any) -> None:
    """Raise if ``value`` is nested so deep that a walk over it could overflow Python's stack."""
    level = [value]
    for _ in range(DEEPEST_JSON):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(e for e in item.values() if type(e) is dict or type(e) is list)
            elif item:
                inner.extend(e for e in item if type(e) is dict or type(e) is list)
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested deeper than {DEEPEST_JSON} levels")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:LONGEST_SHOWN]!r} stands twice in one object")
            seen.add(name)
    return found
