"""The settings of a checkpoint, as a config can take them over.

``io.json`` states what was passed when the checkpoint's config was made, ``model.yaml`` (where it
lies beside) every other argument with its default of that day. Where the config's class is known to
this program, its record is read and its attributes are those of an instance of it. Where it is not,
the files are read as plain data, and the attributes are those of an instance of the class that
takes the settings over.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl

from bioinit import contexts
from bioinit.compat._saved import UnknownClass, defaults, load_context, register
from bioinit.compat._saved.names import ABSENT, find, may_be_called
from bioinit.compat.bionemo.iomixin_utils import hparams_of
from bioinit.contexts.protocol import Context
from bioinit.errors import BioinitError, ConfigError, StorageError, UnknownFormat
from bioinit.record import same

_SUBPATHS = ("model.config", "config", None)
_CONTEXT, _IO = "context", "io.json"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_<]\w*>?)+")
_TEXT = re.compile(r"\bstr\b|\bLiteral\b")
_TARGET = "_target_"
_FIDDLE = "Fiddle context:"
_UNCLEAR = object()


class MissingSettings(StorageError, FileNotFoundError):
    """A checkpoint without a saved config."""


@dataclass(frozen=True)
class Source:
    """What a checkpoint's config was made from.

    ``names`` are the fields that can be taken over, ``hparams`` the arguments that they have,
    defaults included; a field that its class computes has none.
    """

    where: str
    record: Any
    names: frozenset[str]
    hparams: Mapping[str, Any]

    def attributes(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each field, in a config that has the arguments ``kept`` of another one.

        Raises:
            ConfigError: with these arguments there is no such config.
        """
        record = copy.deepcopy(self.record)
        for name, value in kept.items():
            setattr(record, name, copy.deepcopy(value))
        made = built(record, f"in {self.where}, with what override_parent_fields keeps,")
        return {name: getattr(made, name) for name in self.names}


def built(record: Any, which: str) -> Any:
    """What ``record`` makes.

    Raises:
        ConfigError: it makes nothing. The message calls it the settings ``which``.
    """
    try:
        return fdl.build(record)
    except BioinitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the settings {which} make no {fdl.get_callable(record).__name__}: "
            f"{str(error).partition(_FIDDLE)[0].strip()}. Correct the fields that it names, or "
            "take them off or onto override_parent_fields."
        ) from error


def open_source(
    path: Path, config: Any, kept: Collection[str], plainly: Mapping[str, Any]
) -> Source:
    """The settings of the checkpoint at ``path``, for ``config``, which keeps the fields ``kept``.

    Args:
        path: of the checkpoint.
        config: what takes the settings over.
        kept: its fields that stay as they are.
        plainly: arguments that it should have been made from, since their attributes were set.

    Raises:
        MissingSettings: no saved config lies there.
        ConfigError: a value cannot be understood, or nothing there is a field of ``config``.
    """
    register(type(config))
    context = _context(path)
    record = _known_record(path)
    cls: Any = None if record is None else fdl.get_callable(record)
    if dataclasses.is_dataclass(cls):
        _take_defaults_of_that_day(record, context, cls)
        computed = {f.name for f in dataclasses.fields(cls) if not f.init}
        names = frozenset(f.name for f in dataclasses.fields(cls))
        return Source(context.where, record, names, dict(_arguments(record, names - computed)))
    return _from_plain_data(context, config, kept, plainly)


def _context(path: Path) -> Context:
    try:
        return contexts.read_file(path)
    except (UnknownFormat, StorageError) as error:
        if path.is_file():
            raise MissingSettings(
                f"{path} is a file, and settings are taken over from a folder with "
                f"{_CONTEXT}/{_IO} in it. `bioinit convert {path} FOLDER --to nemo2` makes one of "
                "an archive of NeMo 1."
            ) from error
        raise MissingSettings(
            f"No such file: '{path / _CONTEXT / _IO}', and {path} holds no saved config of another "
            f"kind, so there are no settings to take over ({error}). Give the folder of a "
            f"checkpoint, in which {_CONTEXT}/{_IO} lies; to load weights alone, call "
            "update_model_from_checkpoint."
        ) from error


def _known_record(path: Path) -> Any:
    """The record of the config, where all classes that it names are known; else None."""
    places = [path / _CONTEXT, path]
    place = next((place for place in places if (place / _IO).is_file()), None)
    if place is None:
        return None
    for subpath in _SUBPATHS:
        try:
            return load_context(place, subpath=subpath, build=False)
        except UnknownClass:
            return None
        except ConfigError:
            if subpath is None:
                raise
    return None


def _take_defaults_of_that_day(record: Any, context: Context, cls: Any) -> None:
    """Set what was not passed where the class has another default today."""
    today = defaults(cls)
    hints = {field.name: _hint(field) for field in dataclasses.fields(cls)}
    for name, value in _unpassed(context):
        if name not in record.__arguments__ and name in today and name in hints:
            then = _understood(value, today[name], hints[name])
            if then is not _UNCLEAR and not _equal(then, today[name]):
                setattr(record, name, then)


def _equal(one: Any, other: Any) -> bool:
    """Whether they are the same, or numbers of equal value: YAML writes 1.0 and 1 alike."""
    are_numbers = not isinstance(one, bool) and isinstance(one, int | float)
    are_numbers = are_numbers and type(other) in (int, float)
    return same(one, other) or (are_numbers and bool(one == other))


def _unpassed(context: Context) -> Iterator[tuple[str, Any]]:
    raw = context.raw if isinstance(context.raw, Mapping) else {}
    for name in raw.get("default") or ():
        if name in context.data:
            yield name, context.data[name]


def _arguments(record: Any, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    otherwise = defaults(fdl.get_callable(record))
    for name in names:
        if name in record.__arguments__:
            yield name, record.__arguments__[name]
        elif name in otherwise:
            yield name, otherwise[name]


def _from_plain_data(
    context: Context, config: Any, kept: Collection[str], plainly: Mapping[str, Any]
) -> Source:
    cls = type(config)
    mine = {field.name: field for field in dataclasses.fields(config)}
    record = copy.deepcopy(hparams_of(config))
    for name, value in plainly.items():
        setattr(record, name, copy.deepcopy(value))
    otherwise = defaults(cls)
    unpassed = {name for name, _ in _unpassed(context)}
    names, unclear = [], []
    for name, value in context.data.items():
        if name not in mine or not mine[name].init or name in kept:
            continue
        understood = _understood(value, otherwise.get(name), _hint(mine[name]))
        if understood is not _UNCLEAR:
            names.append(name)
            setattr(record, name, understood)
        elif name not in unpassed:
            unclear.append(f"{name} ({value!r:.80})")
    if unclear:
        raise ConfigError(
            f"{context.where} states what this program does not know: {', '.join(unclear)}. "
            "Nothing is imported because a file says so. Import the classes and call io.track_io "
            "on them, or set these fields yourself and add them to override_parent_fields."
        )
    known = {*names, *(name for name in mine if name in context.data)}
    if not known:
        raise ConfigError(
            f"{context.where} has no field of {cls.__name__}: it describes "
            f"{context.model or 'its model'} in the dialect {context.dialect!r}. Give a checkpoint "
            "whose config has fields of these names."
        )
    computed = {name for name, field in mine.items() if not field.init}
    hparams = dict(_arguments(record, names))
    return Source(context.where, record, frozenset({*names, *computed}), hparams)


def _hint(field: dataclasses.Field[Any]) -> str:
    kind: Any = field.type
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


def _understood(value: Any, default: Any, hint: str) -> Any:
    """A plain value as a field would hold it; ``_UNCLEAR`` if nobody can say what it names."""
    if isinstance(value, str):
        if isinstance(default, str) or _TEXT.search(hint):
            return value
        found = find(value)
        if found is not ABSENT:
            return found
        kind, _, member = value.rpartition(".")
        if isinstance(default, enum.Enum) and kind.rpartition(".")[2] == type(default).__name__:
            return type(default).__members__.get(member, _UNCLEAR)
        return _UNCLEAR if _DOTTED.fullmatch(value) else value
    if isinstance(value, list):
        kind_of: Any = type(default)
        if default is None and hint.lower().startswith("tuple"):
            kind_of = tuple
        return kind_of(value) if kind_of in (tuple, set, frozenset) else value
    if isinstance(value, dict) and _TARGET in value:
        target = find(str(value[_TARGET]))
        # NeMo writes a member of an enum as its class alone: nobody can say which it was.
        is_enum = isinstance(target, type) and issubclass(target, enum.Enum)
        if target is ABSENT or is_enum or not may_be_called(target):
            return _UNCLEAR
        inner = {k: _understood(v, None, "") for k, v in value.items() if k != _TARGET}
        if any(v is _UNCLEAR for v in inner.values()):
            return _UNCLEAR
        return fdl.Config(target, **inner)
    return value
