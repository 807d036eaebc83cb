"""Fiddle's JSON (``io.json``) as plain data: its table of objects is read, and no name in it.

==========================  =========================================================
in the file                 here
==========================  =========================================================
leaf                        the number, text, boolean or null itself; nan and inf too
list, tuple, set            list
dict                        dict, with the keys it had; a tuple as a key stays one
bytes                       their hexadecimal text
function, class, dtype,     dotted name, as saved: ``"torch.bfloat16"``,
member of an enum           ``"pkg.colors.Color.RED"``
``Config`` of a class       dict of its fields, the class under ``"_target_"``
``Partial``                 the same with ``"_partial_": True``
any other object            like a ``Config`` of its class
==========================  =========================================================

What several places share is the same Python object here. A cycle is an error, and so is a table
that unfolds to more than any config could be.
"""

from __future__ import annotations

import ast
import re
from typing import Any, NoReturn

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage import Folder

VERSION = "0.0.1"
LARGEST = 4 << 20
DEEPEST = 64
MOST_VALUES = 500_000
TARGET, PARTIAL, ARGS = "_target_", "_partial_", "_args_"
_LONGEST_SHOWN = 80
_LONGEST_NAME = 1000
_BYTES_PER_VALUE = 64
_PRIMITIVE = (bool, int, float, str, type(None))
_LISTS = ("builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset")
_BUILDABLE = "BuildableTraverserMetadata"
_FIELD = re.compile(r"Attr\(name=(?:'([^'\\]+)'|\"([^\"\\]+)\")\)")
_INDEX = re.compile(r"Index\(index=-?\d+\)")
_KEY = re.compile(r"Key\(key=(.{1,1000})\)", re.DOTALL)


def read_fiddle(folder: Folder, name: str) -> Any:
    """The root object of a JSON file that fiddle wrote.

    Raises:
        CorruptCheckpoint: it is not such a file, or its references lead nowhere or in a circle.
        RefusedCheckpoint: it is of a version that is not known.
    """
    file = folder.file(name)
    if file.size > LARGEST:
        raise CorruptCheckpoint(
            f"{file} has {file.size} bytes, and no saved config has more than {LARGEST}. Check "
            "that it is the checkpoint's own config."
        )
    return parse_fiddle(folder.read_json(name), str(file))


def parse_fiddle(document: Any, where: str) -> Any:
    """The root object of a parsed ``document``; ``where`` is how messages call its file."""
    if not isinstance(document, dict) or not isinstance(document.get("objects"), dict):
        raise CorruptCheckpoint(
            f"{where} is no config that fiddle saved: it has no table of objects. Fetch or write "
            "it again."
        )
    version = document.get("version")
    if version != VERSION:
        raise RefusedCheckpoint(
            f"{where} is of version {version!r:.40}, and fiddle's version {VERSION!r} is the one "
            "that can be read. Install a newer bioinit, or save the config with fiddle 0.3."
        )
    return Reader(document["objects"], where).value(document.get("root"), "root", 0)[0]


class Reader:
    """One table. Every object is read once, with how many values it unfolds to."""

    def __init__(self, objects: dict[str, Any], where: str) -> None:
        self.objects = objects
        self.where = where
        self.known: dict[str, tuple[Any, int] | None] = {}

    def value(self, node: Any, at: str, depth: int) -> tuple[Any, int]:
        if isinstance(node, _PRIMITIVE):
            return node, 1
        if not isinstance(node, dict):
            self._corrupt(at, f"a {type(node).__name__} stands where a value should")
        kind = node.get("type")
        if kind == "leaf":
            if not isinstance(node.get("value"), _PRIMITIVE):
                self._corrupt(at, "a leaf holds no number and no text")
            return node.get("value"), 1
        if kind == "pyref":
            return self._name(node, at), 1
        if kind == "ref":
            return self._shared(node.get("key"), at, depth)
        if not isinstance(kind, dict):
            self._corrupt(at, f"the type {kind!r:.{_LONGEST_SHOWN}} is unknown")
        return self._object(node, self._name(kind, at), at, depth)

    def _shared(self, key: Any, at: str, depth: int) -> tuple[Any, int]:
        if not isinstance(key, str) or key not in self.objects:
            self._corrupt(at, f"it refers to {key!r:.{_LONGEST_SHOWN}}, which is not in the table")
        if key not in self.known:
            if depth > DEEPEST:
                self._corrupt(at, f"references lead more than {DEEPEST} levels down")
            self.known[key] = None
            self.known[key] = self.value(self.objects[key], key[:_LONGEST_SHOWN], depth + 1)
        found = self.known[key]
        if found is None:
            self._corrupt(at, f"its reference to {key!r:.{_LONGEST_SHOWN}} closes a circle")
        return found

    def _object(self, node: dict[str, Any], kind: str, at: str, depth: int) -> tuple[Any, int]:
        items = node.get("items")
        if not isinstance(items, list):
            self._corrupt(at, "its items are no list")
        total = 1
        pairs: list[tuple[str, Any]] = []
        for item in items:
            if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
                self._corrupt(at, "an item is no pair of a place and a value")
            value, size = self.value(item[1], f"{at}.{item[0]:.{_LONGEST_SHOWN}}", depth + 1)
            total += size
            if total > MOST_VALUES:
                self._corrupt(at, f"its references unfold to more than {MOST_VALUES} values")
            pairs.append((item[0], value))
        values = [value for _, value in pairs]
        if kind in _LISTS:
            return values, total
        if kind == "builtins.dict":
            mapping, size = self._dict(node.get("metadata"), pairs, at, depth)
            return mapping, total + size
        if kind == "builtins.bytes":
            found = self._bytes(values, at)
            return found, 1 + len(found) // _BYTES_PER_VALUE
        return self._record(node.get("metadata"), kind, pairs, at), total

    def _dict(
        self, metadata: Any, pairs: list[tuple[str, Any]], at: str, depth: int
    ) -> tuple[dict[Any, Any], int]:
        keys, size = self.value(metadata, f"{at} (keys)", depth + 1)
        if keys is None:  # not every writer repeats them beside the items
            keys = [self._literal(place, at) for place, _ in pairs]
        if not isinstance(keys, list | tuple) or len(keys) != len(pairs):
            self._corrupt(at, "it has not as many keys as values")
        found: dict[Any, Any] = {}
        for key, (_, value) in zip(keys, pairs, strict=True):
            fixed = self._hashable(key, at)
            if fixed in found:
                self._corrupt(at, f"the key {str(key)[:_LONGEST_SHOWN]!r} stands twice")
            found[fixed] = value
        return found, size

    def _hashable(self, key: Any, at: str) -> Any:
        if isinstance(key, dict):
            self._corrupt(at, "a key is a mapping")
        return tuple(self._hashable(part, at) for part in key) if isinstance(key, list) else key

    def _literal(self, place: str, at: str) -> Any:
        match = _KEY.fullmatch(place)
        try:
            key = ast.literal_eval(match[1]) if match is not None else None
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            key = None
        if key is None or not isinstance(key, _PRIMITIVE):
            self._corrupt(at, f"{place:.{_LONGEST_SHOWN}} does not say which key it is")
        return key

    def _bytes(self, values: list[Any], at: str) -> str:
        if len(values) != 1 or not isinstance(values[0], str):
            self._corrupt(at, "bytes are not written as one text")
        try:
            return values[0].encode("raw_unicode_escape").hex()
        except UnicodeError:
            self._corrupt(at, "bytes are not written as such")

    def _record(
        self, metadata: Any, kind: str, pairs: list[tuple[str, Any]], at: str
    ) -> dict[str, Any]:
        """An object with a class: its own, or for a ``Config`` the one that it configures."""
        configured = self._configured(metadata, at)
        found: dict[str, Any] = {TARGET: kind if configured is None else configured}
        if configured is not None and kind.endswith("Partial"):
            found[PARTIAL] = True
        places = []
        for place, value in pairs:
            match = _FIELD.fullmatch(place)
            name = match[1] or match[2] if match is not None else place
            if match is None and _INDEX.fullmatch(place):
                places.append(value)
                continue
            if name in found:
                self._corrupt(at, f"the field {name[:_LONGEST_SHOWN]!r} stands twice")
            found[name] = value
        if places:
            found[ARGS] = places
        return found

    def _configured(self, metadata: Any, at: str) -> str | None:
        """The name of what a ``Config`` configures; None if this is no ``Config``."""
        if isinstance(metadata, dict) and metadata.get("type") == "ref":
            key = metadata.get("key")
            metadata = self.objects.get(key) if isinstance(key, str) else None
            if metadata is None:
                self._corrupt(at, f"its description {key!r:.{_LONGEST_SHOWN}} is not in the table")
        kind = metadata.get("type") if isinstance(metadata, dict) else None
        if not isinstance(kind, dict) or kind.get("name") != _BUILDABLE:
            return None
        items = metadata.get("items")
        for item in items if isinstance(items, list) else ():
            if isinstance(item, list) and len(item) == 2 and item[0] == "Attr(name='fn_or_cls')":
                found, _ = self.value(item[1], at, DEEPEST)
                if isinstance(found, str):
                    return found
        self._corrupt(at, "it does not say what it configures")

    def _name(self, node: dict[str, Any], at: str) -> str:
        """The dotted name of a reference into Python."""
        if node.get("type") == "ref":  # a class can be shared like anything else
            found, _ = self._shared(node.get("key"), at, DEEPEST)
            if isinstance(found, str):
                return found
        module, name = node.get("module"), node.get("name")
        if not isinstance(module, str) or not isinstance(name, str) or not module or not name:
            self._corrupt(at, "a reference into Python has no module and name")
        if len(module) + len(name) > _LONGEST_NAME:
            self._corrupt(at, f"a name has {len(module) + len(name)} letters")
        return f"{module}.{name}"

    def _corrupt(self, at: str, what: str) -> NoReturn:
        raise CorruptCheckpoint(
            f"{self.where} is damaged: at {at:.200} {what}. Fetch or write it again."
        )
