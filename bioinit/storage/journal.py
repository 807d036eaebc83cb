"""What an unfinished folder holds that is whole: notes that a killed process leaves for the next.

Each note is one line of JSON, written after the bytes that it speaks of are on the disk. A last
line that was cut short is no note. Whose work it is, is said by the first line: notes of other work
are dropped.
"""

from __future__ import annotations

import json
import os
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
        whole = data[: data.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines or lines[0].get("work") != work:
            self._path.unlink()
            return
        self._notes = {line["key"]: line["value"] for line in lines[1:]}
        if len(whole) != len(data):
            os.truncate(self._path, len(whole))


def is_journal_of(folder: Path, work: str) -> bool:
    """Whether ``folder`` holds a journal that was begun for ``work``."""
    try:
        with open(folder / _NAME, "rb") as file:
            line = file.readline()
        return line.endswith(b"\n") and json.loads(line) == {"work": work}
    except (OSError, ValueError):
        return False
