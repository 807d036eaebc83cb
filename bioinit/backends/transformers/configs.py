"""``config.json`` as transformers understands it, with what it says itself kept apart.

A config class of transformers renames old spellings, fills in what the file leaves out and
computes the rest. All three matter: a value that is *literally* in the file is the writer's word,
a default is the class's. Which old spelling became which field is found by asking: the config is
made once more without it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import keyword
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from bioinit.backends import transformers as backend
from bioinit.backends.transformers.architectures import make_config
from bioinit.errors import ConfigError

DROPPED = {
    "transformers_version": "it says who wrote the file",
    "dtype": "every tensor says its own; placement.dtype changes it",
    "torch_dtype": "every tensor says its own; placement.dtype changes it",
    "_name_or_path": "it says where the writer had read the model",
    "_commit_hash": "it says where the writer had read the model",
    "gradient_checkpointing": "it says how the writer trained, not what the model is",
}
"""Fields of a saved config that describe no model, and why they are left behind."""

_TABLES = ("attribute_map", "sub_configs")
_CLASS = "it says which class this is"
_RENAMED = {
    "rope_theta": "rope_parameters",
    "rope_scaling": "rope_parameters",
    "partial_rotary_factor": "rope_parameters",
    "rotary_pct": "rope_parameters",
    "rotary_emb_base": "rope_parameters",
    "num_labels": "id2label",
}
"""Old spellings that would go unnoticed where they equal the default."""


_SPELLED: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "bool | None": bool | None,
    "list[str] | None": list[str] | None,
}
"""Annotations that transformers leaves as text, and what they are."""


class SavedConfig(NamedTuple):
    """A saved config in the fields of its transformers class.

    ``values`` has every field but nested configs; ``undeclared`` what the class keeps without
    declaring it. ``literal`` names the fields that the file states, under whatever spelling.
    ``became`` says of each name in the file which fields it is now; of those that are gone, why.
    """

    cls: type
    values: dict[str, Any]
    undeclared: dict[str, Any]
    nested: dict[str, SavedConfig]
    literal: frozenset[str]
    became: dict[str, tuple[str, ...] | str]


class Declared(NamedTuple):
    """A field of a transformers config class; ``computed`` if None means that the class knows."""

    name: str
    annotation: Any
    default: Any
    computed: bool


@functools.cache
def declared(cls: Any) -> tuple[Declared, ...]:
    """The fields of a transformers config class, those of :data:`DROPPED` left out."""
    try:
        usual = make_config(cls, {})
    except ConfigError:  # a few classes cannot be made of their defaults
        usual = None
    found = []
    fields = dataclasses.fields(cls)
    names = {field.name for field in fields}
    for field in fields:
        # A class may declare a field and its alias; values are kept under one name only.
        if field.name in DROPPED or cls.attribute_map.get(field.name) in names:
            continue
        # Behind a property stands a field with an underscore; files and people use the property.
        public = field.name.removeprefix("_")
        name = public if isinstance(getattr(cls, public, None), property) else field.name
        default = field.default
        if default is dataclasses.MISSING:
            factory: Any = field.default_factory
            default = None if factory is dataclasses.MISSING else factory()
        computed = (
            default is None
            and name not in (*cls.sub_configs, "id2label", "label2id")
            and getattr(usual, name, None) is not None
        )
        found.append(Declared(name, _annotation(field.type), plain(default), computed))
    return tuple(found)


def _annotation(hint: Any) -> Any:
    """What a value may be, null included, in types that a person's words can be checked against."""
    simple = _simple(_SPELLED.get(hint, Any) if isinstance(hint, str) else hint)
    return simple if simple is Any else simple | None


def _simple(hint: Any) -> Any:
    outer, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float, bool, str, None, type(None)):
        return hint
    if outer is Literal:
        return hint
    if outer in (typing.Union, types.UnionType):
        members = [_simple(a) for a in arguments]
        return Any if Any in members else functools.reduce(operator.or_, members)
    if outer in (list, tuple) and arguments:
        inner = {_simple(a) for a in arguments if a is not Ellipsis}
        return tuple[inner.pop() if len(inner) == 1 else Any, ...]  # type: ignore[misc]
    return Any


def read(cls: Any, data: Mapping[str, Any]) -> SavedConfig:
    """Read a saved config by transformers' own class; plain data, nothing of it is imported.

    Raises:
        ConfigError: transformers refuses a value.
    """
    given = {k: cls._decode_special_floats(v) for k, v in data.items() if k != "model_type"}
    saved = _read(make_config(cls, _usable(cls, given)), given)
    if "model_type" in data:
        saved.became["model_type"] = _CLASS
    return saved


def _usable(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a config can keep of ``given``, at every depth: a field that hides no method of it."""
    general = backend.imported().PreTrainedConfig
    found = {k: v for k, v in given.items() if _unusable(cls, k) is None}
    for name, kind in cls.sub_configs.items():
        if isinstance(inner := found.get(name), Mapping):
            found[name] = _usable(kind if issubclass(kind, general) else general, inner)
    return found


def _unusable(cls: Any, name: str) -> str | None:
    """Why no field of a config can have this name."""
    if not name.isidentifier() or keyword.iskeyword(name):
        return "no field can have this name"
    held = inspect.getattr_static(cls, name, None)
    is_method = callable(held) or isinstance(held, classmethod | staticmethod)
    if name == "self" or name.startswith("__") or name in _TABLES or is_method:
        return f"it would hide what {cls.__name__} needs under this name"
    return None


def _read(made: Any, raw: Mapping[str, Any]) -> SavedConfig:
    cls: Any = type(made)
    given = _usable(cls, raw)
    names = {field.name for field in declared(cls)}
    nested = {
        name: _read(value, _mapping(given.get(name)))
        for name in cls.sub_configs
        if isinstance(value := getattr(made, name, None), backend.imported().PreTrainedConfig)
    }
    values = {key: plain(value) for key, value in made.to_dict().items() if key not in nested}
    values |= {n: plain(getattr(made, n, None)) for n in names - values.keys() - nested.keys()}
    # A declared field may itself be the alias of a name that is not declared.
    aliases = {target: alias for alias, target in cls.attribute_map.items() if alias in names}
    aliases |= cls.attribute_map
    became: dict[str, tuple[str, ...] | str] = {
        name: reason for name in raw if (reason := _unusable(cls, name)) is not None
    }
    undeclared: dict[str, Any] = {}
    for name in given:
        if name in DROPPED or name == "model_type":
            became[name] = DROPPED.get(name, _CLASS)
        elif name in names or name in nested:
            became[name] = (name,)
        elif aliases.get(name) in names:
            became[name] = (aliases[name],)
        else:
            changed, is_kept = _influence(cls, given, name, names)
            if changed:
                became[name] = changed
            elif is_kept and name in values:
                undeclared[name] = values[name]
                became[name] = (name,)
            else:
                became[name] = "transformers no longer reads it from a config"
    stated = {n for fields in became.values() if isinstance(fields, tuple) for n in fields}
    literal = frozenset(stated & names)
    unlabelled = {"id2label", "label2id"} - literal  # transformers makes up two labels
    found = {n: None if n in unlabelled else values.get(n) for n in names - nested.keys()}
    return SavedConfig(cls, found, undeclared, nested, literal, became)


def _influence(
    cls: Any, given: Mapping[str, Any], name: str, names: set[str]
) -> tuple[tuple[str, ...], bool]:
    """The declared fields that an undeclared ``name`` changes, and whether the class keeps it."""
    inner = {k for k in cls.sub_configs if isinstance(given.get(k), Mapping)}
    alone = {k: v for k, v in given.items() if k not in inner}
    with_it = make_config(cls, alone).to_dict()
    without = make_config(cls, {k: v for k, v in alone.items() if k != name}).to_dict()
    changed = tuple(sorted(k for k in names if with_it.get(k) != without.get(k)))
    if not changed and _RENAMED.get(name) in names:
        changed = (_RENAMED[name],)
    return changed, name in with_it


def plain(value: Any) -> Any:
    """Plain data with tuples for lists, as our configs hold it."""
    if isinstance(value, tuple | list):
        return tuple(plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, backend.imported().PreTrainedConfig):
        return plain(value.to_dict())
    return copy.copy(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
