"""The door: what people write becomes the values of fields, or an error that names the field.

Every value is coerced on its own, by pydantic, against the annotation of its field. Validating
whole objects would forget which fields were written, and would compute derived fields twice.
"""

from __future__ import annotations

import collections.abc
import enum
import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import fiddle as fdl
from pydantic import BeforeValidator, ConfigDict, PlainValidator, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.record import names
from bioinit.record.fields import (
    Origin,
    Spec,
    Unresolved,
    config_types,
    is_config,
    label,
    set_in,
    specs,
)

_LAX = ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True)
_PACKAGE = Path(__file__).parents[1]
_SEQUENCES: tuple[type, ...] = (tuple, list, set, frozenset)


def make_record(
    cls: type, raw: Mapping[str, Any], origins: Mapping[str, Origin] | None = None, *, at: str = ""
) -> Any:
    """The record of a config: ``cls``, and the fields that ``raw`` writes, coerced one by one.

    Args:
        cls: a config class, that is a keyword-only dataclass.
        raw: fields by name; nested mappings for nested configs. Only what somebody wrote.
        origins: who wrote each dotted key, for messages; kept in the record if it has a place.
        at: the dotted path of this config in the run, for messages.

    Raises:
        ConfigError: an unknown field, a computed one, or a wrong value; all of them, with paths.
    """
    problems: list[str] = []
    record = _Door(origins or {}, problems).record(cls, raw, at)
    if problems:
        raise ConfigError("\n".join(problems))
    return record


def coerce(cls: type, name: str, value: Any, *, at: str = "") -> Any:
    """``value`` as the field ``name`` of ``cls`` would hold it in a record.

    Raises:
        ConfigError: there is no such field, it is computed, or the value does not fit.
    """
    record = make_record(cls, {name: value}, at=at)
    return set_in(record)[name]


def fit(spec: Spec, value: Any, path: str) -> Any:
    """``value`` as the field of ``spec`` would hold it in a record; ``path`` is for messages.

    Raises:
        ConfigError: it does not fit.
    """
    problems: list[str] = []
    fitting = _Door({}, problems).value(spec, spec.annotation, value, path)
    if problems:
        raise ConfigError("\n".join(problems))
    return fitting


def _written_by_hand(record: Any, name: str) -> str | None:
    """Where a person's own code assigned to a field of a record, ``file.py:12``; else None.

    fiddle remembers for every field who set it last. What came through the door was set in here.
    """
    history = record.__argument_history__.get(name)
    location = history[-1].location if history else None
    if location is None or Path(location.filename).is_relative_to(_PACKAGE):
        return None
    return f"{Path(location.filename).name}:{location.line_number}"


def judge(record: Any, at: str = "") -> dict[str, str]:
    """Send through the door what a person's code assigned to a record directly.

    Returns:
        The dotted path of every such field, and the line of code that set it.

    Raises:
        ConfigError: a value does not fit its field; all of them, with their paths.
    """
    problems: list[str] = []
    by_hand: dict[str, str] = {}
    _judge(record, at, problems, by_hand)
    if problems:
        raise ConfigError("\n".join(problems))
    return by_hand


def _judge(value: Any, at: str, problems: list[str], by_hand: dict[str, str]) -> None:
    if isinstance(value, tuple | list):
        for number, item in enumerate(value):
            _judge(item, f"{at}.{number}", problems, by_hand)
    if not isinstance(value, fdl.Config) or not is_config(fdl.get_callable(value)):
        return
    known = specs(fdl.get_callable(value))
    for name, item in set_in(value).items():
        path = f"{at}.{name}" if at else name
        where = _written_by_hand(value, name)
        if where is not None and not known[name].marks.bookkeeping:
            by_hand[path] = where
            fitting = _Door({}, problems).value(known[name], known[name].annotation, item, path)
            setattr(value, name, fitting)
        _judge(set_in(value)[name], path, problems, by_hand)


def unknown_field(cls: type, name: str) -> str:
    """The sentence for a name that is no field of ``cls``."""
    known = [s.name for s in specs(cls).values() if s.init and not s.marks.bookkeeping]
    return f"{cls.__name__} has no field {name!r}. " + (
        suggestion(name, known) or f"Its fields: {', '.join(known)}."
    )


def record_of(config: Any) -> Any:
    """The record of a live config: its own if it keeps one, else what differs from the defaults."""
    if isinstance(config, fdl.Buildable):
        return config
    keeps = getattr(config, "_tracking", None)
    if keeps is not None:
        return keeps.record_for(config)
    record = fdl.Config(type(config))
    for spec in specs(type(config)).values():
        value = getattr(config, spec.name)
        if spec.init and (spec.is_required or value != spec.default_value()):
            setattr(record, spec.name, value if spec.marks.bookkeeping else with_records(value))
    return record


def with_records(value: Any) -> Any:
    """``value`` with every config in it replaced by its record."""
    if is_config(value) and not isinstance(value, type):
        return record_of(value)
    if type(value) in (tuple, list):
        return type(value)(map(with_records, value))
    if type(value) is dict:
        return {key: with_records(item) for key, item in value.items()}
    return value


class _Door:
    def __init__(self, origins: Mapping[str, Origin], problems: list[str]) -> None:
        self.origins = origins
        self.problems = problems

    def refuse(self, path: str, reason: str) -> None:
        origin = self.origins.get(path)
        where = f" ({origin.where})" if origin is not None and origin.where else ""
        self.problems.append(f"{path}{where}: {reason}")

    def record(self, cls: type, raw: Mapping[str, Any], at: str) -> Any:
        record = fdl.Config(cls)
        known = specs(cls)
        for name, value in raw.items():
            path = f"{at}.{name}" if at else str(name)
            spec = known.get(name)
            if spec is None or spec.marks.bookkeeping:
                self.refuse(path, unknown_field(cls, name))
            elif not spec.init:
                self.refuse(
                    path,
                    f"{cls.__name__} computes this field, it cannot be set to {value!r}. Set the "
                    "fields it is computed from.",
                )
            else:
                setattr(record, name, self.value(spec, spec.annotation, value, path))
        for spec in known.values():
            if spec.marks.bookkeeping:
                setattr(record, spec.name, dict(self.origins))
            elif spec.name not in raw and is_config(spec.default_factory):
                # A place to set nested fields in, and to read their defaults from.
                setattr(record, spec.name, self.record(spec.default_factory, {}, ""))
        return record

    def value(self, spec: Spec, annotation: Any, value: Any, path: str) -> Any:
        if isinstance(annotation, Unresolved):
            self.refuse(
                path,
                f"its type {annotation.text!r} cannot be resolved ({annotation.reason}). Import or "
                "define it at the top level of the module, outside of `if TYPE_CHECKING`.",
            )
            return value
        if isinstance(value, fdl.Buildable) or (is_config(value) and not isinstance(value, type)):
            return self._config(annotation, with_records(value), path)
        types = config_types(annotation)
        if not types:
            return self._leaf(spec, annotation, value, path)
        outer: Any = get_origin(annotation)
        arguments = get_args(annotation)
        if outer in (Union, UnionType):
            return self._union(spec, arguments, value, path)
        if outer is Annotated:
            return self.value(spec, arguments[0], value, path)
        if outer in (tuple, list) and isinstance(value, _SEQUENCES):
            items = list(value)  # type: ignore[call-overload]
            each = [a for a in arguments if a is not Ellipsis]
            kinds = each * len(items) if len(each) == 1 else each
            if len(kinds) != len(items):
                self.refuse(path, f"{len(items)} values, but {len(kinds)} are expected.")
                return value
            made = enumerate(zip(kinds, items, strict=True))
            return outer(self.value(spec, kind, v, f"{path}.{i}") for i, (kind, v) in made)
        if issubclass(outer or object, Mapping) and isinstance(value, Mapping):
            return {k: self.value(spec, arguments[1], v, f"{path}.{k}") for k, v in value.items()}
        if isinstance(value, Mapping) and isinstance(annotation, type):
            return self.record(annotation, value, path)
        self.refuse(path, f"{value!r} is no {_spoken(annotation)}. Write its fields, key by key.")
        return value

    def _config(self, annotation: Any, record: Any, path: str) -> Any:
        types = config_types(annotation)
        cls = fdl.get_callable(record)
        if types and not (isinstance(cls, type) and issubclass(cls, types)):
            self.refuse(path, f"a {cls.__qualname__} is no {_spoken(annotation)}.")
        return record

    def _union(self, spec: Spec, members: Sequence[Any], value: Any, path: str) -> Any:
        if value is None and type(None) in members:
            return None
        attempts: list[list[str]] = []
        for member in members:
            if member is type(None):
                continue
            attempt = _Door(self.origins, [])
            found = attempt.value(spec, member, value, path)
            if not attempt.problems:
                return found
            attempts.append(attempt.problems)
        fewest = min(len(problems) for problems in attempts)
        self.problems.extend(next(p for p in attempts if len(p) == fewest))
        return value

    def _leaf(self, spec: Spec, annotation: Any, value: Any, path: str) -> Any:
        if isinstance(value, set | frozenset):  # the order of a set is no order at all
            value = sorted(value, key=repr)
        try:
            return _adapter(spec, annotation).validate_python(value)
        except ValidationError as error:
            for found in _messages(error):
                self.refuse(path, f"{found} Expected: {_spoken(annotation)}.")
            return value


def _messages(error: ValidationError) -> list[str]:
    by_input: dict[str, list[str]] = {}
    for found in error.errors(include_url=False):
        message = found["msg"].removeprefix("Value error, ")
        reasons = by_input.setdefault(repr(found["input"]), [])
        if message not in reasons:
            reasons.append(message)
    return [f"{given} is wrong: {'; or '.join(reasons)}." for given, reasons in by_input.items()]


def _spoken(annotation: Any) -> str:
    """An annotation as a person would say it."""
    outer, arguments = get_origin(annotation), get_args(annotation)
    if outer is Annotated:
        return _spoken(arguments[0])
    if outer in (Union, UnionType):
        return " or ".join("null" if a is type(None) else _spoken(a) for a in arguments)
    if outer is Literal:
        return " | ".join("null" if a is None else str(a) for a in arguments)
    if outer in (tuple, list) and arguments:
        return f"a list of {_spoken(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " | ".join(member.name for member in annotation)
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


@functools.lru_cache(maxsize=4096)
def _cached_adapter(choices: tuple[Any, ...], annotation: Any) -> TypeAdapter[Any]:
    lenient = _lenient(annotation, choices)
    try:
        return TypeAdapter(lenient, config=_LAX)
    except PydanticSchemaGenerationError as error:
        raise ConfigError(f"the annotation {annotation} cannot be checked: {error}.") from None


def _adapter(spec: Spec, annotation: Any) -> TypeAdapter[Any]:
    try:
        return _cached_adapter(spec.choices, annotation)
    except TypeError:  # an annotation or a default that cannot be hashed
        return _cached_adapter.__wrapped__(spec.choices, annotation)


def _lenient(annotation: Any, choices: tuple[Any, ...]) -> Any:
    """``annotation`` with the spellings that people use in YAML accepted."""
    outer, arguments = get_origin(annotation), get_args(annotation)
    if outer is Literal:
        return annotation
    if annotation in (Callable, typing.Callable) or outer in (collections.abc.Callable, type):
        return Annotated[Any, PlainValidator(functools.partial(names.resolve, choices=choices))]
    if outer is Annotated:
        return Annotated[(_lenient(arguments[0], choices), *arguments[1:])]
    if outer in (Union, UnionType):
        return Union[tuple(_lenient(a, choices) for a in arguments)]  # noqa: UP007
    if outer is not None and arguments:
        return outer[tuple(a if a is Ellipsis else _lenient(a, choices) for a in arguments)]
    if annotation in (int, float):
        return Annotated[annotation, BeforeValidator(_no_boolean)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return Annotated[annotation, BeforeValidator(functools.partial(_member, annotation))]
    if label(annotation) == "torch.dtype":
        return Annotated[Any, PlainValidator(names.dtype)]
    if label(annotation) == "torch.device":
        return Annotated[Any, PlainValidator(names.device)]
    return annotation


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _member(kind: type[enum.Enum], value: Any) -> Any:
    """Enums are written by name or by value; by name first."""
    return kind[value] if isinstance(value, str) and value in kind.__members__ else value
