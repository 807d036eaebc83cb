"""Unpickled values as data that any JSON writer takes: for `inspect`, and for reading configs."""

from __future__ import annotations

from typing import Any

from bioinit.unpickle.values import Opaque, Refused, StorageRef, Symbol, TensorRef

MOST_ITEMS = 20_000
DEEPEST = 40
LONGEST_BYTES = 64
LONGEST_TEXT = 10_000
MOST_TEXT = 4_000_000
BITS_PER_DIGIT = 3
LONGEST_INT_BITS = 4096
OMITTED = "..."


def plain(value: Any) -> Any:
    """``value`` as dicts, lists, text and numbers, without its tensors.

    An inert object becomes ``{"class": name, ...}`` with its state, a call that was not made
    ``{"refused": name}``. Entries that are tensors, or hold nothing else, are left out. What goes
    on for ever or is too large is cut off with ``"..."``.
    """
    return _Plain().of(value, 0)


class _Nothing:
    """Stands for what was left out."""


_NOTHING = _Nothing()


class _Plain:
    def __init__(self) -> None:
        self.room = MOST_ITEMS
        self.letters = MOST_TEXT
        # By identity; the text is kept too, so that no other one gets its place.
        self.texts: dict[int, tuple[str, str]] = {}

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
            bits = value.bit_length()
            self.letters -= bits // BITS_PER_DIGIT
            return value if bits <= LONGEST_INT_BITS and self.letters >= 0 else OMITTED
        if kind is str:
            return self._text(value)
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
            return {"refused": self._text(f"{value.module}.{value.name}")}
        if isinstance(value, Symbol):
            return self._text(repr(value))
        return self._text(str(value)[: LONGEST_TEXT + 1])

    def _text(self, value: str) -> str:
        """``value`` as text that any terminal and any file takes: short, no half characters."""
        self.letters -= min(len(value), LONGEST_TEXT)
        if self.letters < 0:
            return OMITTED
        if value.isascii() and len(value) <= LONGEST_TEXT:
            return value
        found = self.texts.get(id(value))
        if found is None:
            short = value if len(value) <= LONGEST_TEXT else value[:LONGEST_TEXT] + OMITTED
            short = short.encode("utf-8", "replace").decode("utf-8")
            found = self.texts[id(value)] = (value, short)
        return found[1]

    def _mapping(self, value: dict[Any, Any], depth: int) -> Any:
        found = {}
        for key, entry in value.items():
            if type(entry) is TensorRef:
                continue
            inner = self._of(entry, depth + 1)
            if inner is not _NOTHING:
                found[self._text(key if type(key) is str else str(key)[: LONGEST_TEXT + 1])] = inner
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
        found: dict[str, Any] = {"class": self._text(f"{value.module}.{value.name}")}
        for name in ("args", "state", "items"):
            inner = self._of(getattr(value, name), depth + 1)
            if inner is not _NOTHING and inner is not None and inner != []:
                found[name] = inner
        return found
