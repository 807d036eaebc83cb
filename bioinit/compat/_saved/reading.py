"""Objects from ``io.json``: built only from classes that this program knows.

The file is read as plain data by :mod:`bioinit.contexts._fiddle`. Each name in it is looked up in
:mod:`bioinit.compat._saved.names`; all that are not known are named in one error, before anything
is built.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import fiddle as fdl

from bioinit.compat._saved.artifact import Artifact, DirArtifact, artifacts_of
from bioinit.compat._saved.names import ABSENT, find, may_be_called, may_be_prepared
from bioinit.compat._saved.writing import IO_FILE
from bioinit.contexts._artifacts import inside
from bioinit.contexts._fiddle import LARGEST, Reader, parse_fiddle
from bioinit.errors import ConfigError, CorruptCheckpoint, RefusedCheckpoint, StorageError
from bioinit.keys import suggestion
from bioinit.storage import Folder, outside

BuiltT = TypeVar("BuiltT")
_LOG = logging.getLogger(__name__)
_CONTEXT = "context"
_MOST_SHOWN = 20
_LISTS = {"builtins.tuple": tuple, "builtins.set": set, "builtins.frozenset": frozenset}
_KINDS = {"Partial": fdl.Partial, "ArgFactory": fdl.ArgFactory}
_PATH = re.compile(r"pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path")
_STEP = re.compile(r"\.?(?:([^.\[\]]+)|\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\])")
_PLACE = re.compile(r"(?:Attr\(name=|Key\(key=|Index\(index=)(?:'(.*)'|\"(.*)\"|(\d{1,9}))\)")


class MissingContext(StorageError, FileNotFoundError):
    """There is no ``io.json`` where one was looked for."""


class UnknownClass(RefusedCheckpoint):
    """A saved file names classes or functions that this program has not said itself."""

    def __init__(self, message: str, unknown: tuple[str, ...]) -> None:
        super().__init__(message)
        self.unknown = unknown


@overload
def load(path: Path | str, output_type: type[BuiltT], subpath: str | None = None) -> BuiltT: ...
@overload
def load(
    path: Path | str, output_type: Any = Any, subpath: str | None = None, build: bool = True
) -> Any: ...
def load(
    path: Path | str, output_type: Any = Any, subpath: str | None = None, build: bool = True
) -> Any:
    """Stands in for ``nemo.lightning.io.load``: an object, made again from ``io.json``.

    What differs: a class is built only if this program has said it itself (it is a subclass of
    ``IOMixin``, or ``track_io`` was called on it); nothing is imported or unpickled because the
    file says so; a ``subpath`` that is not there is an error; files that were saved along must lie
    in the folder.

    Args:
        path: the folder that holds ``io.json``, or the file itself.
        output_type: what the caller expects, for type checkers.
        subpath: make only this part of it: ``model.config``, ``extra['dummy']``.
        build: make the object; else return its ``fdl.Config``.

    Raises:
        MissingContext: there is no such file; it is a ``FileNotFoundError`` too.
        UnknownClass: it names classes or functions that this program does not know.
        CorruptCheckpoint: it is no such file, or damaged.
        RefusedCheckpoint: it wants something unpickled, or leads out of its folder.
        ConfigError: there is nothing at ``subpath``.
    """
    place = Path(path)
    file = place / IO_FILE if os.path.isdir(place) else place
    if not os.path.isfile(file):
        raise MissingContext(
            f"No such file: '{file}'. Give the folder into which io_dump wrote, or a checkpoint "
            f"that has a folder {_CONTEXT}."
        )
    if file.stat().st_size > LARGEST:
        raise CorruptCheckpoint(
            f"{file} has {file.stat().st_size} bytes, and no saved config has more than {LARGEST}."
            " Check the path."
        )
    record = _record(Folder.at(file.parent).read_json(file.name), str(file), subpath)
    _find_artifacts(record, file, set())
    drop_unexpected_params(record)
    return fdl.build(record) if build else record


def load_context(path: Path | str, subpath: str | None = None, build: bool = True) -> Any:
    """Stands in for ``nemo.lightning.io.load_context``: the saved context of a checkpoint.

    Where ``path`` holds no ``io.json``, its folder ``context`` is tried; where ``path`` is that
    folder, the one around it. Differs as :func:`load` does.

    Args:
        path: a checkpoint, its folder ``context``, or ``io.json`` itself.
        subpath: make only this part of it, such as ``model.config``.
        build: make the object; else return its ``fdl.Config``.
    """
    first = Path(path)
    try:
        return load(first, subpath=subpath, build=build)
    except FileNotFoundError:
        second = first.parent if first.name == _CONTEXT else first / _CONTEXT
        return load(second, subpath=subpath, build=build)


def drop_unexpected_params(config: Any) -> bool:
    """Stands in for ``nemo.lightning.io.drop_unexpected_params``: drops what a class has lost.

    Arguments that the class of a ``fdl.Config`` does not take now are deleted, in configs within
    lists and mappings too, where the original left them; each time with a warning in the log.

    Returns:
        Whether anything was dropped.
    """
    return _dropped(config, "<root>", set())


def _dropped(value: Any, at: str, seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, Mapping):
        return any([_dropped(item, f"{at}[{key!r}]", seen) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return any([_dropped(item, f"{at}[{i}]", seen) for i, item in enumerate(value)])
    if not isinstance(value, fdl.Buildable):
        return False
    parameters = _parameters(fdl.get_callable(value))
    updated = False
    if parameters is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = value.__arguments__
        lost = [name for name in arguments if isinstance(name, str) and name not in parameters]
        if lost:
            _LOG.warning("Deprecated parameters to drop from %s: %s", at, lost)
            updated = True
        for name in lost:
            del arguments[name]
    inner = [_dropped(item, f"{at}.{name}", seen) for name, item in value.__arguments__.items()]
    return updated or any(inner)


def _parameters(target: Any) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):  # some classes that are written in C do not say
        return None


def _record(document: Any, where: str, subpath: str | None) -> Any:
    if not isinstance(document, dict) or not isinstance(document.get("objects"), dict):
        parse_fiddle(document, where)  # which says what is wrong with it
    root = document.get("root")
    if subpath:
        root = _at(document, subpath, where)
    parse_fiddle({**document, "root": root}, where)  # all that can be wrong with plain data
    reader = _Records(document["objects"], where)
    record, _ = reader.value(root, "root", 0)
    if reader.unknown:
        raise _unknown(reader.unknown, where)
    if isinstance(record, fdl.Buildable):
        return record
    raise CorruptCheckpoint(
        f"{where}: {'at ' + repr(subpath) if subpath else 'its root'} is a "
        f"{type(record).__name__} and no object that could be built. "
        + ("Name an object as subpath." if subpath else "Fetch or write it again.")
    )


def _unknown(unknown: Mapping[str, str], where: str) -> UnknownClass:
    shown = ", ".join(list(unknown)[:_MOST_SHOWN])
    more = f" and {len(unknown) - _MOST_SHOWN} more" if len(unknown) > _MOST_SHOWN else ""
    return UnknownClass(
        f"{where} names what this program does not know, or has called what it only knows as a "
        f"value: {shown}{more}. Nothing is imported because a file says so. Import your classes "
        "and make them known: subclasses of IOMixin are; of other classes call "
        "track_io(TheClass), of enums and functions make_known(it). What has moved takes its old "
        "name, track_io(TheClass, names=('old.module.TheClass',)). Or load only a part, with "
        "subpath=.",
        tuple(unknown),
    )


def _at(document: Mapping[str, Any], subpath: str, where: str) -> Any:
    """The node of the file at a path like ``model.config`` or ``extra['a'][0]``."""
    objects: Mapping[str, Any] = document["objects"]
    node = _followed(document.get("root"), objects)
    position, taken = 0, ""
    while position < len(subpath):
        step = _STEP.match(subpath, position)
        if step is None:
            raise ConfigError(
                f"subpath={subpath!r} is no path from {position + 1} on. Write it like "
                "model.config or extra['name'][0]."
            )
        key = next(part for part in step.groups() if part is not None)
        within = _within(node)
        if key not in within:
            raise ConfigError(
                f"{where} has nothing at {subpath!r}: at {taken or 'the top'} there is no {key!r}. "
                f"{suggestion(key, within)} There is: {', '.join(within) or 'nothing'}."
            )
        node = _followed(within[key], objects)
        position, taken = step.end(), subpath[: step.end()]
    return node


def _followed(node: Any, objects: Mapping[str, Any]) -> Any:
    for _ in range(len(objects) + 1):
        if not isinstance(node, dict) or node.get("type") != "ref":
            break
        node = objects.get(str(node.get("key")))
    return node


def _within(node: Any) -> dict[str, Any]:
    """What is stated within a node, by name, key or index."""
    items = node.get("items") if isinstance(node, dict) else None
    found = {}
    for item in items if isinstance(items, list) else ():
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], str):
            place = _PLACE.fullmatch(item[0])
            if place is not None:
                found[next(part for part in place.groups() if part is not None)] = item[1]
    return found


class _Text(str):
    """An argument that could be a file's path and is none."""


class _Records(Reader):
    """Reads records of known classes; names that are not known are gathered."""

    def __init__(self, objects: dict[str, Any], where: str) -> None:
        super().__init__(objects, where)
        self.unknown: dict[str, str] = {}

    def value(self, node: Any, at: str, depth: int) -> tuple[Any, int]:
        if isinstance(node, dict) and node.get("type") == "pyref":
            return self._known(self._name(node, at), at), 1
        return super().value(node, at, depth)

    def _known(self, name: str, at: str) -> Any:
        found = find(name)
        if found is ABSENT:
            self.unknown.setdefault(name, at)
        return found

    def _object(self, node: dict[str, Any], kind: str, at: str, depth: int) -> tuple[Any, int]:
        try:
            value, size = super()._object(node, kind, at, depth)
        except TypeError:
            self._corrupt(at, "what cannot be a key is one")
        if kind == "builtins.bytes":
            return bytes.fromhex(value), size
        try:
            return _LISTS[kind](value) if kind in _LISTS else value, size
        except TypeError:
            self._corrupt(at, "a set holds what cannot be in one")

    def _configured(self, metadata: Any, at: str) -> str | None:
        """As in plain data: there a class is its name."""
        plain = Reader(self.objects, self.where)
        return plain._configured(metadata, at)

    def _record(self, metadata: Any, kind: str, pairs: list[tuple[str, Any]], at: str) -> Any:
        name = self._configured(metadata, at)
        if name is None:
            if [place for place, _ in pairs] == ["IdentityElement()"]:
                raise RefusedCheckpoint(
                    f"{self.where}: at {at} a {kind} was pickled into the file "
                    f"{str(pairs[0][1])[:80]!r}, and nothing is unpickled into objects here. Load "
                    "another part with subpath=, or save it again with objects that are tracked."
                )
            self.unknown.setdefault(kind, at)
            return None
        if _PATH.fullmatch(name) and len(pairs) == 1 and isinstance(pairs[0][1], str):
            return Path(pairs[0][1])
        target = self._known(name, at)
        if target is ABSENT:
            return None
        made = _KINDS.get(kind.rpartition(".")[2], fdl.Config)
        if not (may_be_prepared if made is fdl.Partial else may_be_called)(target):
            self.unknown.setdefault(name, at)
            return None
        arguments: dict[int | str, Any] = {}
        for place, value in pairs:
            match = _PLACE.fullmatch(place)
            is_index = match is not None and match[3] is not None
            if match is None or (is_index and int(match[3]) not in range(len(pairs))):
                self._corrupt(at, f"{place:.80} is no place of an argument")
            arguments[int(match[3]) if is_index else match[1] or match[2] or ""] = value
        named = _by_name(target, arguments)
        if named is None:
            self._corrupt(at, f"{name:.80} has no such places of arguments")
        if isinstance(target, type) and issubclass(target, Artifact):
            text = arguments.get("attr")  # it stands for a text that names no file
            return _Text(text) if isinstance(text, str) else text
        try:
            return _made(made(target), named)
        except (TypeError, ValueError):
            self._corrupt(at, f"{name:.80} takes no arguments")


def _by_name(target: Any, arguments: Mapping[int | str, Any]) -> dict[int | str, Any] | None:
    """The arguments, by name where they have one; None if some stand at no place of ``target``."""
    known = _parameters(target)
    parameters = [] if known is None else list(known.values())
    found: dict[int | str, Any] = {}
    for key, value in arguments.items():
        at = parameters[key] if isinstance(key, int) and key < len(parameters) else None
        name = at.name if at is not None and at.kind is at.POSITIONAL_OR_KEYWORD else key
        if name in found:
            return None
        found[name] = value
    first = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), None)
    alone = {i for i, p in enumerate(parameters) if p.kind is p.POSITIONAL_ONLY}
    rest = sorted(key for key in found if isinstance(key, int) and key not in alone)
    if not rest or known is None:
        return found
    before = parameters[:first]
    is_filled = all(i in found or p.name in found for i, p in enumerate(before))
    if first is None or not is_filled or rest != list(range(first, first + len(rest))):
        return None
    return found


def _made(record: Any, arguments: Mapping[Any, Any]) -> Any:
    """The record with its arguments; those that its class does not take are there too."""
    for key, value in arguments.items():
        try:
            setattr(record, key, value)
        except (AttributeError, TypeError):  # by position, or not of this class any more
            record.__arguments__[key] = value
    return record


def _find_artifacts(value: Any, file: Path, seen: set[int]) -> None:
    """Replace the names of files that were saved along by where they lie now."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _find_artifacts(item, file, seen)
    if not isinstance(value, fdl.Buildable):
        return
    arguments = value.__arguments__
    for artifact in artifacts_of(fdl.get_callable(value)):
        named = arguments.get(artifact.attr)
        if artifact.skip or not isinstance(named, str | Path) or isinstance(named, _Text):
            continue
        kept = file.parent / inside(str(named), str(file), artifact.attr)
        _require_its_own(kept, file.parent)
        if os.path.exists(kept) or not isinstance(
            artifact, DirArtifact
        ):  # which keeps other text as is
            arguments[artifact.attr] = str(kept)
    for name, item in list(arguments.items()):
        if isinstance(item, _Text):
            if os.path.exists(item):  # it named no file when it was written
                inside(item, str(file), name)
            arguments[name] = str(item)
        _find_artifacts(item, file, seen)


def _require_its_own(kept: Path, folder: Path) -> None:
    """Refuse links out of the checkpoint: what is loaded may be written, and sent on, with them."""
    homes = (folder, folder.parent) if folder.name == _CONTEXT else (folder,)
    below = (Path(at, name) for at, inner, names in os.walk(kept) for name in (*inner, *names))
    for path in (kept, *below):
        real = outside(path, homes)
        if real is not None:
            raise RefusedCheckpoint(
                f"{path} is a link to {real}, which is no file of the checkpoint. Put the file "
                "itself in the link's place, or get the checkpoint from a source you trust."
            )
