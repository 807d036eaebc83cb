"""YAML as plain data: read from the parser's events, so that nothing in it constructs anything.

Scalars are null, booleans, integers, floats and text, as PyYAML resolves them, with ``1e-5`` a
float as its writers mean it. A tag that asks for anything else is refused. An alias is the same
object as its anchor; what the whole unfolds to is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage import Folder

LARGEST = 1 << 20
DEEPEST = 64
MOST_VALUES = 200_000
LONGEST_NUMBER = 4000
LONGEST_TEXT = 1 << 16
_LONGEST_SHOWN = 80
_LONGEST_NAME = 1000
_STANDARD = "tag:yaml.org,2002:"
_CONTAINERS = {f"{_STANDARD}map", f"{_STANDARD}seq", f"{_STANDARD}python/tuple"}
_EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+")
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NO_CALL = "dataclasses._HAS_DEFAULT_FACTORY_CLASS"
_CALL, _TARGET, _ARGS, _NAME = "_call_", "_target_", "_args_", "_name_"
_MERGE = object()
ABSENT = object()
"""Stands for a value that the writer did not know either."""


def read_yaml(folder: Folder, name: str) -> Any:
    """The value of a YAML file.

    Raises:
        CorruptCheckpoint: it is not YAML, has a key twice, or is out of all measure.
        RefusedCheckpoint: a tag in it asks for an object to be made.
    """
    file = folder.file(name)
    if file.size > LARGEST:
        raise CorruptCheckpoint(
            f"{file} has {file.size} bytes, and no saved config has more than {LARGEST}. Check "
            "that it is the checkpoint's own config."
        )
    return parse_yaml(folder.read_text(name), str(file))


def read_fields(folder: Folder, name: str) -> dict[str, Any]:
    """The mapping of fields in a YAML file.

    Raises:
        CorruptCheckpoint: as :func:`read_yaml`, or it holds something else.
        RefusedCheckpoint: as :func:`read_yaml`.
    """
    found = read_yaml(folder, name)
    if not isinstance(found, dict):
        kind = "nothing" if found is None else f"a {type(found).__name__}"
        raise CorruptCheckpoint(
            f"{folder.file(name)} holds {kind}, not a mapping of fields. Fetch or write it again."
        )
    odd = [key for key in found if not isinstance(key, str)]
    if odd:
        raise CorruptCheckpoint(
            f"{folder.file(name)} has the field {odd[0]!r:.{_LONGEST_SHOWN}}, which is no name. "
            "Correct it, or fetch it again."
        )
    return found


def parse_yaml(text: str, where: str) -> Any:
    """The value of the YAML ``text``; ``where`` is how messages call its file."""
    try:
        return _Builder(where).build(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise CorruptCheckpoint(
            f"{where}{line} is not usable YAML: {problem:.200}. Fetch or write it again."
        ) from error


def unfolded(value: Any) -> Any:
    """``value`` with the marks of NeMo's and Megatron-Bridge's YAML read as data.

    What is not called becomes its dotted name, a member of an enum too. Any other object stays a
    mapping of its fields with its class under ``_target_``; what stands for "some default" goes.
    """
    return _Unfolding().of(value)


class _Unfolding:
    """Keeps shared values shared."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if not isinstance(value, dict | list):
            return value
        if id(value) not in self.known:
            self.known[id(value)] = self._container(value)
        return self.known[id(value)]

    def _container(self, value: dict[Any, Any] | list[Any]) -> Any:
        if isinstance(value, list):
            return [entry for item in value if (entry := self.of(item)) is not ABSENT]
        target = value.get(_TARGET)
        if isinstance(target, str):
            if target == _NO_CALL:
                return ABSENT
            if value.get(_CALL) is False:
                return target
            member = value.get(_NAME)
            if isinstance(member, str) and _ARGS in value and len(member) <= _LONGEST_SHOWN:
                return f"{target[:_LONGEST_NAME]}.{member}"
        entries = ((key, self.of(item)) for key, item in value.items() if key != _CALL)
        return {key: entry for key, entry in entries if entry is not ABSENT}


class _Builder:
    """One file: the containers that are open, the anchors, and how much all of it unfolds to."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.numbers = yaml.constructor.SafeConstructor()
        self.anchors: dict[str | None, tuple[Any, int]] = {}

    def build(self, text: str) -> Any:
        loader = _PARSER(text)
        try:
            events = self._events(loader)
            next(event for event in events if isinstance(event, yaml.StreamStartEvent))
            first = next(events)
            if isinstance(first, yaml.StreamEndEvent):
                return None
            value, _ = self._value(next(events), events, loader, 0)
            next(events)
            after = next(events)
            if not isinstance(after, yaml.StreamEndEvent):
                self._corrupt(after, "a second document begins")
            return value
        finally:
            loader.dispose()

    def _events(self, loader: Any) -> Iterator[Any]:
        while loader.check_event():
            yield loader.get_event()

    def _value(self, event: Any, events: Iterator[Any], loader: Any, depth: int) -> tuple[Any, int]:
        """The value that begins with ``event``, and how many values it unfolds to."""
        if isinstance(event, yaml.AliasEvent):
            found = self.anchors.get(event.anchor)
            if found is None:
                self._corrupt(event, f"the alias *{event.anchor:.40} has no anchor before it")
            return found
        if depth > DEEPEST:
            self._corrupt(event, f"it is nested deeper than {DEEPEST} levels")
        if isinstance(event, yaml.ScalarEvent):
            value, size = self._scalar(event, loader), 1
        else:
            if event.tag is not None and event.tag not in _CONTAINERS:
                self._refuse(event)
            if event.anchor is not None:
                # Until it is closed: an alias to it from inside would be a cycle.
                self.anchors.pop(event.anchor, None)
            is_list = isinstance(event, yaml.SequenceStartEvent)
            value, size = (self._list if is_list else self._mapping)(event, events, loader, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, size)
        return value, size

    def _list(
        self, start: Any, events: Iterator[Any], loader: Any, depth: int
    ) -> tuple[list[Any], int]:
        found: list[Any] = []
        total = 1
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            value, size = self._value(event, events, loader, depth + 1)
            found.append(value)
            total = self._counted(event, total + size)
        return found, total

    def _mapping(
        self, start: Any, events: Iterator[Any], loader: Any, depth: int
    ) -> tuple[dict[Any, Any], int]:
        found: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        total = 1
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            if isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
                key, _ = self._value(event, events, loader, depth + 1)
            else:
                self._corrupt(event, "a key is no scalar")
            if isinstance(key, dict | list):
                self._corrupt(event, "a key is no scalar")
            value, size = self._value(next(events), events, loader, depth + 1)
            total = self._counted(event, total + size)
            if key is _MERGE:
                for part in value if isinstance(value, list) else [value]:
                    if not isinstance(part, dict):
                        self._corrupt(event, "what is merged with << is no mapping")
                    for name, entry in part.items():
                        merged.setdefault(name, entry)
            elif key in found:
                self._corrupt(event, f"the key {str(key)[:_LONGEST_SHOWN]!r} stands twice")
            else:
                found[key] = value
        return ({**merged, **found} if merged else found), total

    def _scalar(self, event: Any, loader: Any) -> Any:
        text: str = event.value
        if len(text) > LONGEST_TEXT:
            self._corrupt(event, f"a text has {len(text)} letters")
        if event.tag is not None and event.tag != "!":
            tag = event.tag
        elif event.implicit[0] and event.tag is None:
            tag = loader.resolve(yaml.ScalarNode, text, (True, False))
            if tag == f"{_STANDARD}str" and _EXPONENT.fullmatch(text):
                tag = f"{_STANDARD}float"
        else:
            return text
        kind = tag.removeprefix(_STANDARD)
        if kind == "merge":
            return _MERGE
        if kind in ("str", "timestamp", "value"):
            return text
        if kind == "null":
            return None
        if kind not in ("bool", "int", "float"):
            self._refuse(event)
        if len(text) > LONGEST_NUMBER:
            self._corrupt(event, f"a number has {len(text)} digits")
        node = yaml.ScalarNode(tag, text, event.start_mark)
        try:
            return getattr(self.numbers, f"construct_yaml_{kind}")(node)
        except (ValueError, LookupError, OverflowError):
            self._corrupt(event, f"{text[:_LONGEST_SHOWN]!r} is no {kind}")

    def _counted(self, event: Any, total: int) -> int:
        if total > MOST_VALUES:
            self._corrupt(event, f"its aliases unfold to more than {MOST_VALUES} values")
        return total

    def _at(self, event: Any) -> str:
        return f"{self.where}, line {event.start_mark.line + 1}"

    def _corrupt(self, event: Any, what: str) -> NoReturn:
        raise CorruptCheckpoint(f"{self._at(event)}: {what}. Correct it, or fetch it again.")

    def _refuse(self, event: Any) -> NoReturn:
        tag = event.tag or "!"
        shown = tag.replace(_STANDARD, "!!", 1) if tag.startswith(_STANDARD) else tag
        raise RefusedCheckpoint(
            f"{self._at(event)}: the tag {shown:.{_LONGEST_SHOWN}} asks for an object to be made, "
            "and nothing that a checkpoint brings along is made or called. Write the value as "
            "plain YAML, if you trust the file."
        )
