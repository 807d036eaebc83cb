"""How a record is written as JSON, and read back as data.

Numbers, texts, lists and plain mappings are themselves. Anything else is an object with a marker:

    {"$tuple": [1, 2]}  {"$enum": "Color.RED"}  {"$dtype": "bfloat16"}
    {"$name": "torch.nn.functional.gelu"}
    {"$config": "pkg.MyConfig", "set": {...}, "default": {...}, "computed": {...}}

A config says which fields were set, and what the others held then: defaults of the class, and what
it computed. Class names are labels for people. Enums, configs and functions are found among those
that the annotation of a field mentions, or in a closed table; nothing is imported.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import fiddle as fdl

from bioinit.errors import ConfigError, CorruptCheckpoint
from bioinit.record import names
from bioinit.record.door import fit, record_of, unknown_field, with_records
from bioinit.record.fields import (
    SavedField,
    Spec,
    config_types,
    enum_types,
    is_config,
    label,
    same,
    set_in,
    specs,
)
from bioinit.record.live import build

SET, DEFAULT, COMPUTED = "set", "default", "computed"
_MARKER = "$"
_DEEPEST = 64


class Unreadable(NamedTuple):
    """A saved value that this version of the config class has no place for, and why."""

    shown: str
    reason: str


def encode_config(record: Any, at: str) -> dict[str, Any]:
    """A record as JSON data; ``at`` is its dotted path, for messages.

    Raises:
        ConfigError: the record is of no valid config, or holds what cannot be written down.
    """
    cls = fdl.get_callable(record)
    arguments = set_in(record)
    live = build(record, at=at)
    node: dict[str, Any] = {"$config": label(cls), SET: {}, DEFAULT: {}, COMPUTED: {}}
    for name, spec in specs(cls).items():
        if spec.marks.bookkeeping:
            continue
        path = f"{at}.{name}" if at else name
        if name in arguments:
            node[SET][name] = _encode(arguments[name], spec, path)
            continue
        value = getattr(live, name)
        part = DEFAULT if spec.init and same(value, spec.default_value()) else COMPUTED
        try:
            node[part][name] = _encode(value, spec, path)
        except ConfigError as error:
            # Nobody set it, so the class will have it again; the file only shows it.
            node[part][name] = {"$opaque": repr(value), "reason": str(error)}
    return node


def _encode(value: Any, spec: Spec, path: str) -> Any:
    kind = type(value)
    if isinstance(value, fdl.Config) or (is_config(value) and not isinstance(value, type)):
        record = record_of(value)
        cls = fdl.get_callable(record)
        if not spec.marks.any_config and cls not in _with_subclasses(config_types(spec.annotation)):
            raise ConfigError(_unmentioned(path, cls, spec))
        return encode_config(record, path)
    if isinstance(value, enum.Enum):
        if kind not in enum_types(spec.annotation):
            raise ConfigError(_unmentioned(path, kind, spec))
        return {"$enum": f"{kind.__qualname__}.{value.name}"}
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(v, spec, f"{path}.{i}") for i, v in enumerate(value)]}
    if kind is list:
        return [_encode(v, spec, f"{path}.{i}") for i, v in enumerate(value)]
    if kind in (set, frozenset):
        ordered = sorted(value, key=repr)
        return {f"${kind.__name__}": [_encode(v, spec, path) for v in ordered]}
    if isinstance(value, Mapping):
        pairs = [(k, _encode(v, spec, f"{path}.{k}")) for k, v in value.items()]
        if all(isinstance(k, str) and not k.startswith(_MARKER) for k, _ in pairs):
            return dict(pairs)
        return {"$dict": [[_encode(k, spec, path), v] for k, v in pairs]}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if label(kind) in ("torch.dtype", "torch.device"):
        return {f"${kind.__name__}": str(value).removeprefix("torch.")}
    if callable(value):
        try:
            return {"$name": names.name_of(value, spec.choices)}
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    raise ConfigError(
        f"{path}={value!r}: a {label(kind)} cannot be written to a context. Use numbers, texts, "
        "tuples, enums, dtypes, or a nested dataclass."
    )


def _unmentioned(path: str, cls: type, spec: Spec) -> str:
    return (
        f"{path} holds a {label(cls)}, which could not be found again: the type of {spec.name} "
        f"does not mention it. Annotate {spec.name} with {cls.__name__}."
    )


def decode_config(node: Any, cls: type, where: str) -> Any:
    """The record that ``node`` was written from, for ``cls``.

    A default that ``cls`` has changed since then is set to what it was: the file says what the
    model was, not what the class says today.

    Raises:
        CorruptCheckpoint: the node is not what :func:`encode_config` writes.
        ConfigError: a field that was set, an enum or a function is unknown to ``cls``.
    """
    return _Reader(where, whole=False).config(node, cls)


def read_fields(node: Any, cls: type, where: str) -> tuple[dict[str, SavedField], dict[str, str]]:
    """A saved config in the fields of ``cls``, and the names that ``cls`` does not know.

    Every field that the file states is literal, whether it was set, a default, or computed. Nested
    configs are records with every field set. What cannot be read is an :class:`Unreadable` value.

    Returns:
        The fields by today's name, and what each unknown name was: set, default or computed.
    """
    reader = _Reader(where, whole=True)
    fields: dict[str, SavedField] = {}
    unknown: dict[str, str] = {}
    known = {old: s for s in specs(cls).values() for old in (*s.marks.renamed_from, s.name)}
    for part, name, value in reader.parts(node):
        spec = known.get(name)
        if spec is None:
            unknown[name] = part
        elif spec.init:
            place = f"{where}: {name}"
            fields[spec.name] = SavedField(reader.guarded(value, spec), True, place)
    return fields, unknown


def require_readable(node: Any, where: str) -> None:
    """Refuse a node that :func:`plain` cannot read, or that is nested out of all measure.

    Raises:
        CorruptCheckpoint: it is not what :func:`encode_config` writes.
    """
    require_shallow(node, where)
    try:
        plain(node)
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{where} is damaged: {error}. It is not what bioinit writes; write it again with "
            "bioinit, or fetch it again."
        ) from error


def require_shallow(value: Any, where: str) -> None:
    """Refuse data so deep that reading it would run out of stack.

    Raises:
        CorruptCheckpoint: it is nested deeper than any config.
    """
    level = [value] if isinstance(value, Mapping | list) else []
    for _ in range(_DEEPEST):
        inner = (v.values() if isinstance(v, Mapping) else v for v in level)
        level = [v for items in inner for v in items if isinstance(v, Mapping | list)]
        if not level:
            return
    raise CorruptCheckpoint(
        f"{where} is nested deeper than {_DEEPEST} levels, which no config is. Fetch or write it "
        "again."
    )


def plain(node: Any) -> Any:
    """``node`` without markers: names as texts, configs as mappings of every field."""
    if isinstance(node, list):
        return [plain(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    if "$config" in node:
        parts = (node.get(part, {}) for part in (DEFAULT, COMPUTED, SET))
        return {name: plain(value) for part in parts for name, value in part.items()}
    if "$tuple" in node:
        return tuple(plain(item) for item in node["$tuple"])
    if "$float" in node:
        return float(node["$float"])
    if "$dict" in node:
        return {plain(key): plain(value) for key, value in node["$dict"]}
    marker = next((key for key in node if str(key).startswith(_MARKER)), None)
    return {k: plain(v) for k, v in node.items()} if marker is None else plain(node[marker])


class _Reader:
    """Reads nodes for the fields of a class; ``whole`` keeps saved defaults in nested records."""

    def __init__(self, where: str, *, whole: bool) -> None:
        self.where = where
        self.whole = whole

    def parts(self, node: Any) -> Iterator[tuple[str, str, Any]]:
        if not isinstance(node, Mapping) or "$config" not in node:
            raise CorruptCheckpoint(
                f"{self.where} holds no saved config where one is expected. Write it again with "
                "bioinit."
            )
        for part in (DEFAULT, COMPUTED, SET):
            values = node.get(part, {})
            if not isinstance(values, Mapping):
                raise CorruptCheckpoint(f"{self.where}: {part!r} is no mapping. Write it again.")
            for name, value in values.items():
                yield part, name, value

    def config(self, node: Any, cls: type) -> Any:
        record = fdl.Config(cls)
        known = {old: s for s in specs(cls).values() for old in (*s.marks.renamed_from, s.name)}
        for part, name, value in self.parts(node):
            spec = known.get(name)
            if spec is None and part == SET:
                raise ConfigError(f"{self.where}: {unknown_field(cls, name)}")
            if spec is None or not spec.init or part == COMPUTED or _is_opaque(value):
                continue
            decoded = self.fitting(value, spec)
            drifted = self.whole or not same(decoded, with_records(spec.default_value()))
            if part == SET or drifted:
                setattr(record, spec.name, decoded)
        return record

    def guarded(self, node: Any, spec: Spec) -> Any:
        if _is_opaque(node):
            return Unreadable(str(node["$opaque"]), "it was not written down")
        try:
            return self.fitting(node, spec)
        except ConfigError as error:
            return Unreadable(str(plain(node)), str(error))

    def fitting(self, node: Any, spec: Spec) -> Any:
        return fit(spec, self.value(node, spec, spec.annotation), f"{self.where}: {spec.name}")

    def value(self, node: Any, spec: Spec, annotation: Any) -> Any:
        if isinstance(node, list):
            return [self.value(item, spec, annotation) for item in node]
        if not isinstance(node, Mapping):
            return node
        if "$config" in node:
            return self.config(node, self.class_for(node, spec, annotation))
        marker = next((key for key in node if str(key).startswith(_MARKER)), None)
        if marker is None:
            return {key: self.value(item, spec, annotation) for key, item in node.items()}
        inner = node[marker]
        try:
            return self.marked(marker, inner, spec, annotation)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{self.where}: {spec.name} was saved as {marker[1:]} {inner!r}, which this field "
                f"cannot hold ({error}). Set {spec.name} anew and list it in "
                "model.override_parent_fields."
            ) from None

    def marked(self, marker: str, inner: Any, spec: Spec, annotation: Any) -> Any:
        if marker in ("$tuple", "$set", "$frozenset"):
            kind: Callable[[Any], Any] = {"$tuple": tuple, "$set": set}.get(marker, frozenset)
            return kind(self.value(item, spec, annotation) for item in inner)
        if marker == "$dict":
            both = [[self.value(part, spec, annotation) for part in pair] for pair in inner]
            return {key: value for key, value in both}
        if marker == "$enum":
            kind_name, _, member = inner.rpartition(".")
            kinds = [t for t in enum_types(annotation) if t.__qualname__ == kind_name]
            return (kinds or enum_types(annotation))[0][member]
        if marker == "$name":
            return names.resolve(inner, spec.choices)
        simple: Mapping[str, Callable[[Any], Any]] = {
            "$float": float,
            "$dtype": names.dtype,
            "$device": names.device,
            "$path": PurePath,
        }
        return simple[marker](inner)

    def class_for(self, node: Mapping[str, Any], spec: Spec, annotation: Any) -> type:
        """The class among those of the annotation, and their subclasses, that the label means."""
        candidates = _with_subclasses(config_types(annotation))
        meant = [cls for cls in candidates if label(cls) == node["$config"]]
        if not meant and len(config_types(annotation)) == 1:
            meant = [*config_types(annotation)]
        if not meant:
            raise ConfigError(
                f"{self.where}: {spec.name} was saved as a {node['$config']}, which is none of "
                f"{', '.join(map(label, candidates)) or 'no config class'}. Add it to the type of "
                f"{spec.name}."
            )
        return meant[0]


def _with_subclasses(classes: Iterable[type]) -> list[type]:
    found: list[type] = list(classes)
    for cls in found:
        below: list[type] = cls.__subclasses__()
        found.extend(sub for sub in below if sub not in found)
    return found


def _is_opaque(node: Any) -> bool:
    return isinstance(node, Mapping) and "$opaque" in node
