"""Unpickled values as data that any JSON writer takes: for `inspect`, and for reading configs."""

from __future__ import annotations

from typing import Any

from bioinit.unpickle.values import Opaque, Refused, StorageRef, Symbol, TensorRef

MOST_ITEMS = 20_000
DEEPEST = 40
LONGEST_BYTES = 64
LONGEST_TEXT = 1_000_000
LONGEST_INT_BITS = 4096
OMITTED = "..."


def plain(value: Any) -> Any:
    """``value`` as dicts, lists, text and numbers, without its tensors.

    An inert object becomes ``{"class": name, ...}`` with its state, a call that was not made
    ``{"refused": name}``. Entries that are tensors, or hold nothing else, are left out. What goes
    on for ever or is too large is cut off with ``"..."``.
    """
    return _Plain().of(value, 0)


def _text(value: str) -> str:
    """``value`` as text that any terminal and any file takes: no half characters."""
    if len(value) > LONGEST_TEXT:
        value = value[:LONGEST_TEXT] + OMITTED
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


class _Nothing:
    """Stands for what was left out."""


_NOTHING = _Nothing()


class _Plain:
    def __init__(self) -> None:
        self.room = MOST_ITEMS

    def of(self, value: Any, depth: int) -> Any:
        found = self._of(value, depth)
        return None if found is _NOTHING else found

    def _of(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in (TensorRef, StorageRef):
            return _NOTHING
        self.room -= 1
        if kind in (float, bool, type(None)):
            return value
        if kind is int:
            return value if value.bit_length() <= LONGEST_INT_BITS else OMITTED
        if kind is str:
            return _text(value)
        if self.room < 0 or depth > DEEPEST:
            return OMITTED
        if kind in (bytes, bytearray):
            return value.hex() if len(value) <= LONGEST_BYTES else f"{len(value)} bytes"
        if isinstance(value, dict):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple | set | frozenset):
            return self._items(value, depth)
        if isinstance(value, Opaque):
            return self._inert(value, depth)
        if isinstance(value, Refused):
            return {"refused": f"{value.module}.{value.name}"}
        if isinstance(value, Symbol):
            return repr(value)
        return str(value)

    def _mapping(self, value: dict[Any, Any], depth: int) -> Any:
        found = {}
        for key, entry in value.items():
            if type(entry) is TensorRef:
                continue
            inner = self._of(entry, depth + 1)
            if inner is not _NOTHING:
                found[_text(str(key))] = inner
            if self.room < 0:
                found[OMITTED] = OMITTED
                break
        return found if found or not value else _NOTHING

    def _items(self, value: Any, depth: int) -> Any:
        found = []
        for entry in value:
            inner = self._of(entry, depth + 1)
            if inner is not _NOTHING:
                found.append(inner)
            if self.room < 0:
                found.append(OMITTED)
                break
        return found if found or not value else _NOTHING

    def _inert(self, value: Opaque, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {"class": f"{value.module}.{value.name}"}
        for name in ("args", "state", "items"):
            inner = self._of(getattr(value, name), depth + 1)
            if inner is not _NOTHING and inner is not None and inner != []:
                found[name] = inner
        return found
