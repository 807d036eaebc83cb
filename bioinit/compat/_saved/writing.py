"""``io.json`` and the ``.yaml`` files beside it: what an object was made from, written down.

The format is fiddle's, as NeMo 2 writes it. Everything is written beside the folder first and
moved into it at the end, ``io.json`` last.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import fiddle as fdl
import torch
import yaml
from fiddle._src.experimental import serialization

from bioinit.compat._saved import names
from bioinit.compat._saved.artifact import artifacts_of
from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.storage import disk_error

IO_FILE = "io.json"
_LEAVES = (int, float, bool, str, type(None))
_REFERRED = (type, FunctionType, BuiltinFunctionType, MethodType, enum.Enum, torch.dtype)
_OPEN = object()


class Unwritable(ConfigError, serialization.UnserializableValueError):  # type: ignore[misc]
    """A value that ``io.json`` cannot hold."""


class MissingArtifact(ConfigError, ValueError):
    """A file that must be saved along is not there."""


names.write_as(Path, "pathlib", "Path")  # which Python 3.13 calls otherwise


def dump(instance: Any, output: Path | str, yaml_attrs: Iterable[str] = ()) -> None:
    """Write what ``instance`` was made from into the folder ``output``; all of it, or nothing.

    Raises:
        Unwritable: an argument is neither plain data nor an object that is tracked.
        ConfigError: ``yaml_attrs`` names something that is no argument.
        StorageError: the file system refused.
    """
    folder = Path(output)
    attrs = tuple(yaml_attrs)
    for name in attrs:
        if not hasattr(instance.__io__, name):
            known = sorted(map(str, dir(instance.__io__)))
            raise ConfigError(
                f"yaml_attrs names {name!r}, which is no argument of {type(instance).__name__}. "
                + suggestion(name, known)
            )
    try:
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{IO_FILE}.", dir=folder))
        try:
            record = _Plain(half).of(instance, "<root>")
            texts = {f"{name}.yaml": _yaml(getattr(record, name)) for name in attrs}
            texts[IO_FILE] = json.dumps(_Writer(record).result)
            for name, text in texts.items():
                (half / name).write_text(text, encoding="utf-8")
            for path in sorted(half.iterdir(), key=lambda p: (p.name == IO_FILE, p.name)):
                _move(path, folder / path.name)
        finally:
            shutil.rmtree(half, ignore_errors=True)
            if created and folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise disk_error(error, f"write {folder / IO_FILE}") from error


def _move(source: Path, target: Path) -> None:
    if not source.is_dir():
        source.replace(target)
        return
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        _move(path, target / path.name)


class _Plain:
    """A copy of a record in which everything is a record or plain data. Shared stays shared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any, at: str) -> Any:
        if type(value) in _LEAVES:
            return value
        if id(value) not in self.known:
            # The value is kept too: its id stays its own.
            self.known[id(value)] = value, _OPEN
            self.known[id(value)] = value, self._made(value, at)
        made = self.known[id(value)][1]
        if made is _OPEN:
            raise Unwritable(
                f"{at} is a {names.dotted(type(value))} that holds itself, which {IO_FILE} cannot "
                "hold. Leave the inner one out."
            )
        return made

    def _made(self, value: Any, at: str) -> Any:
        if isinstance(value, fdl.Buildable):
            return self._record(value, None, at)
        if isinstance(value, _REFERRED):
            self._refer(value, at, names.Use.NAME)
            return value
        record = getattr(value, "__io__", None)
        if isinstance(record, fdl.Buildable):
            return self._record(record, value, at)
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.of(item, f"{at}[{i}]") for i, item in enumerate(value))
        if type(value) is dict:
            return {
                self._key(key, at): self.of(item, f"{at}[{key!r}]") for key, item in value.items()
            }
        if type(value) is bytes:
            return value
        if isinstance(value, functools.partial):
            return self._record(self._prepared(value, at), None, at)
        if isinstance(value, PurePath):
            return fdl.Config(Path, str(value))
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            return self._record(fdl.Config(type(value), **fields), value, at)
        kind = type(value)
        raise Unwritable(
            f"{at} is a {names.dotted(kind)}, which {IO_FILE} cannot hold: only plain data and "
            f"objects that are tracked are written. Call track_io({kind.__name__}) before it is "
            "made, or pass what it is made from."
        )

    def _prepared(self, value: functools.partial[Any], at: str) -> Any:
        try:
            return fdl.Partial(value.func, *value.args, **value.keywords)
        except (TypeError, ValueError) as error:  # some that are written in C do not say
            raise Unwritable(
                f"{at} is {value!r:.200}, and {IO_FILE} holds arguments by the names that a "
                f"function's signature has: {error}. Pass a function of your own in its place."
            ) from error

    def _key(self, key: Any, at: str) -> Any:
        if type(key) in _LEAVES or isinstance(key, enum.Enum):
            return self.of(key, at)
        if type(key) is tuple:
            return tuple(self._key(part, at) for part in key)
        raise Unwritable(
            f"{at} has the key {key!r:.80}, and {IO_FILE} holds text, numbers and tuples of them "
            "as keys. Use one of these."
        )

    def _refer(self, value: Any, at: str, use: names.Use) -> None:
        """Let this program read what it writes: to be used again as it is used here."""
        if isinstance(value, enum.Enum):
            names.register(type(value), use=use)
        elif not names.is_closed(value):
            self._require_named(value, at)
            names.register(value, use=use)

    def _require_named(self, value: Any, at: str) -> None:
        if isinstance(value, MethodType) and not isinstance(value.__self__, type):
            raise Unwritable(
                f"{at} is {value!r:.200}, a method of an object, and {IO_FILE} holds functions "
                "and classes only. Pass the object."
            )
        name = getattr(value, "__qualname__", "<lambda>")
        module = getattr(value, "__module__", None)
        if module and ("<" not in name or names.find(f"{module}.{name}") is value):
            return
        raise Unwritable(
            f"{at} is {value!r:.200}, which nobody could find again by its name. Use a function "
            "or class that a module defines."
        )

    def _record(self, record: Any, instance: Any, at: str) -> Any:
        made = copy.copy(record)
        self._refer(fdl.get_callable(record), at, _use(record, instance))
        arguments = made.__arguments__
        for key, value in self._with_artifacts(made, instance, at).items():
            arguments[key] = self.of(
                value, f"{at}.{key}" if isinstance(key, str) else f"{at}[{key}]"
            )
        return made

    def _with_artifacts(self, record: Any, instance: Any, at: str) -> dict[Any, Any]:
        """The arguments, with files copied and named by where they lie now."""
        found = dict(record.__arguments__)
        for artifact in artifacts_of(fdl.get_callable(record)):
            value = getattr(record, artifact.attr, None)
            if artifact.skip or (value is None and not artifact.required):
                continue
            if value is None:
                raise MissingArtifact(
                    f"{at}.{artifact.attr} is required, because it is an artifact, but is not "
                    f"provided. Pass it, or declare {artifact!r} with required=False."
                )
            found[artifact.attr] = artifact.dump(instance, value, self.folder, Path())
        return found


def _use(record: Any, instance: Any) -> names.Use:
    """What this program says by writing ``record`` of a callable."""
    target = fdl.get_callable(record)
    if isinstance(record, fdl.Partial):
        return names.Use.PREPARE
    is_made_so = instance is not None and type(instance) is target
    return names.Use.CALL if is_made_so or dataclasses.is_dataclass(target) else names.Use.NAME


class _Writer(serialization.Serialization):  # type: ignore[misc]
    """fiddle's writer, which finds names without importing and knows torch's dtypes."""

    def _serialize(self, value: Any, current_path: Any, all_paths: Any = None) -> dict[str, Any]:
        if isinstance(value, torch.dtype | BuiltinFunctionType):
            found = self._pyref(value, current_path)
            if all_paths is not None:
                found["paths"] = serialization.path_strs(all_paths)
            return found
        return super()._serialize(value, current_path, all_paths)  # type: ignore[no-any-return]

    def _pyref(self, value: Any, current_path: Any) -> dict[str, Any]:
        module, name = names.spelled(value)
        return {"type": "pyref", "module": module, "name": name}


def _yaml(value: Any) -> str:
    shown = _shown(value)
    return yaml.safe_dump(shown, allow_unicode=True)


def _shown(value: Any) -> Any:
    """Every argument and every default of a record, for people and for readers of YAML."""
    if isinstance(value, fdl.Buildable):
        target = fdl.get_callable(value)
        found: dict[str, Any] = {"_target_": names.dotted(target)}
        if isinstance(value, fdl.Partial):
            found["_partial_"] = True
        places = {key: item for key, item in value.__arguments__.items() if isinstance(key, int)}
        if places:
            found["_args_"] = [_shown(item) for _, item in sorted(places.items())]
        named = {k: v for k, v in value.__arguments__.items() if isinstance(k, str)}
        for key, item in {**defaults(target), **named}.items():
            found[key] = _shown(item)
        return found
    if isinstance(value, enum.Enum):
        kind = names.dotted(type(value))
        return {"_target_": kind, "_call_": True, "_args_": [value.value], "_name_": value.name}
    if isinstance(value, torch.dtype):
        return {"_target_": str(value), "_call_": False}
    if isinstance(value, type | FunctionType | BuiltinFunctionType | MethodType):
        return {"_target_": names.dotted(value), "_call_": False}
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_shown(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if type(value) in _LEAVES:
        return value
    return {"_target_": names.dotted(type(value)), "_call_": True}


def defaults(target: Any) -> dict[str, Any]:
    """The default of every parameter; of a ``default_factory`` a fresh value."""
    factories = {}
    if dataclasses.is_dataclass(target):
        factories = {
            f.name: f.default_factory
            for f in dataclasses.fields(target)
            if f.default_factory is not dataclasses.MISSING
        }
    found = {}
    for parameter in inspect.signature(target).parameters.values():
        if parameter.name in factories:
            found[parameter.name] = factories[parameter.name]()
        elif parameter.default is not parameter.empty:
            found[parameter.name] = parameter.default
    return found
