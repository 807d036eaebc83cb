"""NeMo 2's saved config: ``context/io.json`` and ``model.yaml``, as plain data.

``io.json`` holds what was passed when the run was set up, ``model.yaml`` every field of the model
that was in force then, defaults included. Where both speak, ``io.json`` is taken; where it is
silent, ``model.yaml``. ``Context.data`` holds the model config's fields, spelled as in
:mod:`bioinit.contexts._fiddle`. ``Context.raw`` says ``literal`` and ``default``: by field the file
that states it, and ``canonical``: the name of the model's class after moves and renames.

An artifact, a file that was saved along, is its path relative to the checkpoint.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from bioinit.contexts._aliases import canonical
from bioinit.contexts._artifacts import TOKENIZER_FILES, inside
from bioinit.contexts._fiddle import PARTIAL, TARGET, read_fiddle
from bioinit.contexts._yaml import read_fields, unfolded
from bioinit.contexts.protocol import Context, ContextKind
from bioinit.errors import CorruptCheckpoint
from bioinit.storage import File, Folder

_CONTEXT = "context"
_IO = "io.json"
_YAMLS = ("model.yaml", "model_config.yaml")
_OURS = "record.json"
_ARTIFACT = re.compile(r"nemo\.lightning\.io\.artifact\.(\w+\.)*\w*Artifact")
_OF_TOKENIZERS = (
    "model_path",
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "pretrained_model_name",
    "name_or_path",
)
_NAMES_OR_PATHS = ("pretrained_model_name", "name_or_path")
_TOKENIZER = re.compile(r"Tokenizer(Fast)?(Spec)?$")
_LONGEST_PATH = 250
_NAMED_BY_FIELD = {
    "model_path": "tokenizer.model",
    "merges_file": "merges.txt",
    "tokenizer_file": "tokenizer.json",
}


def _read(folder: Folder) -> Context | None:
    place = _place(folder)
    if place is None:
        return None
    yaml_name = next((name for name in _YAMLS if place.has(name)), None)
    tree: dict[Any, Any] = {}
    where = ""
    if place.has(_IO):
        where = str(place.path / _IO)
        tree = _tree(read_fiddle(place, _IO), where)
    stated = _model_config(tree.get("model"))
    in_force = str(place.path / yaml_name) if yaml_name is not None else where
    if yaml_name is not None:
        written = _tree(unfolded(read_fields(place, yaml_name)), in_force)
        tree = (
            {**tree, "model": _Merging().of(tree["model"], written["model"])} if tree else written
        )
    artifacts = _Artifacts(place, " and ".join(filter(None, (where, in_force))))
    tree = artifacts.of(tree, "")
    model = tree["model"]
    if not isinstance(model, dict):
        raise CorruptCheckpoint(f"{where or in_force} holds a file in place of a model's config.")
    name = _class_of(model["config"] if isinstance(model.get("config"), dict) else model) or None
    data = _model_config(model)
    return Context(
        dialect="nemo2",
        where=where or in_force,
        data=data,
        model=name,
        tree=tree,
        raw={
            "canonical": None if name is None else canonical(name),
            "literal": {field: where for field in data if field in stated},
            "default": {field: in_force for field in data if field not in stated},
        },
        carried=artifacts.carried,
    )


def _place(folder: Folder) -> Folder | None:
    """The folder in which the files of the context lie, if there is one."""
    if folder.is_file:
        return None
    if _CONTEXT in folder.folders():
        inner = folder.folder(_CONTEXT)
        if _is_context(inner, _YAMLS):
            return inner
    names = _YAMLS if folder.path.name == _CONTEXT else ()
    return folder if _is_context(folder, names) else None


def _is_context(folder: Folder, names: tuple[str, ...]) -> bool:
    """Whether ``io.json`` lies here, or one of ``names`` that is not our own."""
    return folder.has(_IO) or (not folder.has(_OURS) and any(folder.has(name) for name in names))


def _tree(root: Any, where: str) -> dict[Any, Any]:
    """Everything that was saved, the model under ``model`` and its config under ``config``."""
    tree = {"model": {"config": root}}
    if isinstance(root, dict):
        if _class_of(root).endswith("TrainerContext") or {"model", "trainer"} <= root.keys():
            tree = dict(root)
        elif isinstance(root.get("config"), dict):
            tree = {"model": root}
    fields = _model_config(tree.get("model"))
    if not isinstance(root, dict) or not isinstance(tree.get("model"), dict):
        raise CorruptCheckpoint(
            f"{where} holds no config of a model. Fetch or write the checkpoint again."
        )
    odd = [key for key in fields if not isinstance(key, str)]
    if odd:
        raise CorruptCheckpoint(
            f"{where}: the model has the field {odd[0]!r:.80}, which is no name. Fetch it again."
        )
    return tree


def _class_of(value: Any) -> str:
    name = value.get(TARGET) if isinstance(value, dict) else None
    return name if isinstance(name, str) else ""


def _model_config(model: Any) -> dict[Any, Any]:
    """The fields of the model's config, or of the model itself where it has none."""
    if not isinstance(model, dict):
        return {}
    config = model.get("config")
    fields = config if isinstance(config, dict) else model
    return {key: value for key, value in fields.items() if key not in (TARGET, PARTIAL)}


class _Merging:
    """Fills what one config leaves open from another of the same class. Shared stays shared."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], Any] = {}

    def of(self, first: Any, second: Any) -> Any:
        if not isinstance(first, dict) or not isinstance(second, dict):
            return first
        name = _class_of(first)
        if TARGET in first and canonical(name) != canonical(_class_of(second)):
            return first
        if TARGET not in first and ("config" not in first or "config" not in second):
            return first
        pair = id(first), id(second)
        if pair not in self.known:
            merged = {key: self.of(value, second.get(key)) for key, value in first.items()}
            self.known[pair] = {**merged, **{k: v for k, v in second.items() if k not in first}}
        return self.known[pair]


class _Artifacts:
    """Turns artifacts into paths relative to the checkpoint, and finds the tokenizer among them."""

    def __init__(self, place: Folder, where: str) -> None:
        self.place = place
        self.where = where
        self.start = f"{_CONTEXT}/" if place.path.name == _CONTEXT else ""
        self.carried: dict[str, File] = {}
        self.known: dict[int, Any] = {}

    def of(self, value: Any, at: str) -> Any:
        if not isinstance(value, dict | list):
            return value
        if id(value) not in self.known:
            self.known[id(value)] = self._container(value, at)
        return self.known[id(value)]

    def _container(self, value: dict[Any, Any] | list[Any], at: str) -> Any:
        if isinstance(value, list):
            return [self.of(item, f"{at}.{i}") for i, item in enumerate(value)]
        kind = _class_of(value)
        if _ARTIFACT.fullmatch(kind):
            held = value.get("attr")
            if not isinstance(held, str) or value.get("skip") is True:
                return held
            return self._followed(held, at, at.rpartition(".")[2])
        is_tokenizer = _TOKENIZER.search(kind[-_LONGEST_PATH:]) is not None
        found = {}
        for key, item in value.items():
            inner = f"{at}.{key}" if at else str(key)
            if is_tokenizer and key in _OF_TOKENIZERS and isinstance(item, str):
                found[key] = self._followed(item, inner, key)
            else:
                found[key] = self.of(item, inner[-200:])
        return found

    def _followed(self, text: str, at: str, field: str) -> str:
        """The path ``text`` relative to the checkpoint; itself, if nothing lies there."""
        if len(text) > _LONGEST_PATH:  # no file has such a name, so it is none
            return text
        if field in _NAMES_OR_PATHS and text.startswith("/"):  # of the machine that wrote it
            return text
        path = inside(text, self.where, at)
        name = str(path)
        if name == ".":
            return text
        if self.place.has(name):
            self._carry(
                name, path.name if path.name in TOKENIZER_FILES else _NAMED_BY_FIELD.get(field)
            )
            return self.start + name
        if "/".join(path.parts[:1]) in self.place.folders() and self._carry_folder(path):
            return self.start + name
        return text

    def _carry(self, name: str, output: str | None) -> None:
        if output is not None:
            self.carried.setdefault(output, self.place.file(name))

    def _carry_folder(self, path: PurePosixPath) -> bool:
        inner = self.place
        for part in path.parts:
            if part not in inner.folders():
                return False
            inner = inner.folder(part)
        for name in inner.names():
            if name in TOKENIZER_FILES:
                self.carried.setdefault(name, inner.file(name))
        return True


CONTEXT = ContextKind(read=_read, rank=6)
