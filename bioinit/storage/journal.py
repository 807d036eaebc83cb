"""What an unfinished folder holds that is whole: notes that a killed process leaves for the next.

Each note is one line of JSON, written after the bytes that it speaks of are on the disk. What a
crash of the machine may leave, a line that was cut short or is no note, ends the journal: from
there on it is forgotten. Whose work it is, is said by the first line: notes of other work are
dropped.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bioinit.storage.file import disk_error

_NAME = "journal"


class Journal:
    """Notes by key, kept in the file ``journal`` of a folder that is being written.

    Args:
        folder: where it lies; the folder of what it notes, which is not yet under its final name.
        work: a digest of what is being done. Notes that were made for other work are not read.
    """

    NAME = _NAME

    def __init__(self, folder: Path, work: str) -> None:
        self._path = folder / _NAME
        self._notes: dict[str, Any] = {}
        try:
            self._read(work)
            self._file = open(self._path, "ab")
            if not self._notes and not self._file.tell():
                self._append({"work": work})
        except OSError as error:
            raise disk_error(error, f"write {self._path}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def notes(self) -> Mapping[str, Any]:
        """What was noted, by key."""
        return self._notes

    def note(self, key: str, value: Any) -> None:
        """Remember ``value``, plain data, under ``key``; what it speaks of must be on the disk."""
        try:
            self._append({"key": key, "value": value})
        except OSError as error:
            raise disk_error(error, f"write {self._path}") from error
        self._notes[key] = value

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, work: str) -> None:
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        lines = data.splitlines(keepends=True)
        if not lines or not _is_of(lines[0], work):
            self._path.unlink()
            return
        whole = len(lines[0])
        for line in lines[1:]:
            note = _read(line)
            if not isinstance(note.get("key"), str) or "value" not in note:
                break
            self._notes[note["key"]] = note["value"]
            whole += len(line)
        if whole != len(data):
            os.truncate(self._path, whole)


def is_journal_of(folder: Path, work: str) -> bool:
    """Whether ``folder`` holds a journal that was begun for ``work``."""
    return holds_journal(folder) and _is_of(_first_line(folder), work)


def holds_journal(folder: Path) -> bool:
    """Whether ``folder`` is a folder and holds a file that is called like a journal."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(folder).st_mode)
        return is_folder and stat.S_ISREG(os.lstat(folder / _NAME).st_mode)
    except OSError:
        return False


def _first_line(folder: Path) -> bytes:
    try:
        with open(folder / _NAME, "rb") as file:
            return file.readline()
    except OSError:
        return b""


def _is_of(line: bytes, work: str) -> bool:
    return _read(line) == {"work": work}


def _read(line: bytes) -> dict[str, Any]:
    """What a whole line says; nothing if it was cut short or was never written by us."""
    try:
        said = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
