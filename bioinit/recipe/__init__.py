"""From a recipe's name and a person's words to the record of a run.

Hydra composes plain trees and nothing else: the presets, the recipe that chooses them, the words
of the command line, in this order. Which of them said what is kept for every key, because a value
that a person *wrote* is not treated as a default is. The schema judges once, when the record is
made.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fiddle as fdl
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bioinit.errors import ConfigError
from bioinit.recipe import sources
from bioinit.recipe.overrides import Job, Word, jobs
from bioinit.recipe.sources import Document, Source
from bioinit.record import Origin, make_record

if TYPE_CHECKING:
    from bioinit.config import Run, TrainableModelConfig

__all__ = ["Composed", "Job", "compose", "compose_tree", "jobs", "sources"]

_ROOT = "bioinit_run"
_NOT_A_FIELD = ("defaults", *sources.GROUPS)
_OWN = "own"
_INTERPOLATION = re.compile(r"(\\*)\$\{")
# Hydra and its config store are one per process: two threads may not compose at once.
_COMPOSING = threading.Lock()


@dataclass(frozen=True)
class Composed:
    """A recipe and its overrides as plain data, and who wrote each key of it."""

    tree: dict[str, Any]
    origins: dict[str, Origin]

    def render(self) -> str:
        """The tree as YAML, itself a recipe file: what is literal here is escaped there."""
        order = ("family", *sources.GROUPS, "output_dir")
        keys = [key for key in order if key in self.tree]
        keys += [key for key in self.tree if key not in order]
        tree = _each_text({key: self.tree[key] for key in keys}, _escaped)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def compose(name: str, overrides: Sequence[str] = ()) -> fdl.Config[Run]:
    """The record of the run that a recipe and ``key=value`` overrides describe.

    Args:
        name: a name that ``bioinit recipes`` lists, or the path of a YAML file.
        overrides: what the command line takes after it, for example ``["model.num_labels=3"]``.

    Raises:
        ConfigError: an unknown name anywhere, a value that does not fit, no such recipe.
        StorageError: a person's own recipe file cannot be read.
    """
    from bioinit.config import Run  # torch; a tree is composed and printed without it

    composed = compose_tree(name, overrides)
    tree = dict(composed.tree)
    model = tree.pop("model", None) or {}
    problems: list[str] = []
    with _collected(problems):
        tree["model"] = _model(name, tree.get("family"), model, composed.origins)
    with _collected(problems):
        record: fdl.Config[Run] = make_record(Run, tree, composed.origins)
    if problems:
        raise ConfigError("\n".join(problems))
    return record


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems.append(str(error))


def _model(recipe: str, family: Any, written: Any, origins: dict[str, Origin]) -> Any:
    """The record of the model's config; plain fields where the checkpoint decides its class."""
    from bioinit import families

    if not isinstance(written, dict):
        raise ConfigError(
            f"recipe {recipe}: model is {written!r}, not a mapping of fields. Write them below it, "
            "as in model: {num_labels: 3}; a preset is chosen in the defaults list."
        )
    target = written.pop("_target_", None)
    if target is not None:
        cls: type[TrainableModelConfig] | None = _class_named(target, origins)
    elif not isinstance(family, str):
        raise ConfigError(
            f"recipe {recipe} names neither a family (it has {family!r}) nor a config class. Write "
            f"family: NAME, one of {', '.join(families.names())}; or, for a class of your own, "
            "model._target_: mypackage.MyConfig."
        )
    else:
        cls = families.load(family).config
    return written if cls is None else make_record(cls, written, origins, at="model")


@contextmanager
def _importing_from_here(module: str) -> Iterator[None]:
    """A recipe may name a class of the project it lies in, and only then is code run from there.

    Were the current folder always searched, whatever a library tries to import and does not find
    would be taken from it, and it may be a checkpoint. If ``module`` was found there, its folder
    stays, for what it imports later.
    """
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        return (yield)
    sys.path.append(here)
    try:
        yield
    finally:
        file = getattr(sys.modules.get(module), "__file__", None) or ""
        if not file.startswith(here + os.sep):
            sys.path.remove(here)


def _class_named(target: str, origins: dict[str, Origin]) -> type[TrainableModelConfig]:
    """The config class that a person's recipe names; only this is ever imported by name."""
    from bioinit.config import TrainableModelConfig

    where = origins["model._target_"].where
    module, _, name = str(target).rpartition(".")
    try:
        with _importing_from_here(module):
            found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a person's module may fail in any way while it is imported
        raise ConfigError(
            f"model._target_ ({where}): importing {target!r} failed, {type(error).__name__}: "
            f"{error}. Give the dotted name of a config class, its folder on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, TrainableModelConfig)):
        raise ConfigError(
            f"model._target_ ({where}): {target!r} is no model config. It must be a subclass of "
            "bioinit.TrainableModelConfig."
        )
    return found


def compose_tree(name: str, overrides: Sequence[str] = ()) -> Composed:
    """Compose without judging: Hydra only, no torch.

    Raises:
        ConfigError: no such recipe or preset, invalid YAML, or a word that is no ``key=value``.
        StorageError: a person's own recipe file cannot be read.
    """
    words = [Word.typed(text) for text in overrides]
    for word in words:
        if word.key == "recipe":
            raise ConfigError(f"{word.text!r}: the recipe is already {name!r}. Leave this out.")
        word.check()
    recipe = sources.find(name)
    literals: dict[str, str] = {}
    passed = [f"recipe={_option(recipe)}", *(_for_hydra(word, literals) for word in words)]
    with _COMPOSING, _registered(recipe) as documents, _as_config_errors(recipe):
        folder = str(sources.shipped("conf"))
        with initialize_config_dir(config_dir=folder, version_base="1.3"):
            config = hydra_compose(_ROOT, overrides=passed)
            loader = GlobalHydra.instance().config_loader()
            parts = loader.compute_defaults_list(_ROOT, passed, RunMode.RUN).defaults
        tree: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    merged = [part.config_path for part in parts if not part.config_path.startswith("hydra/")]

    def spell_out(text: str) -> str:
        for token, path in literals.items():
            text = text.replace(token, path)
        return text

    _check_names(recipe, tree)
    return Composed(_each_text(tree, spell_out), _origins(merged, documents, recipe, words))


def _check_names(recipe: Source, tree: dict[Any, Any]) -> None:
    """Keys of a recipe and of its sections are names; deeper ones (id2label) may be numbers."""
    sections = [part for part in tree.values() if isinstance(part, dict)]
    wrong = [key for part in (tree, *sections) for key in part if not isinstance(key, str)]
    if wrong:
        raise ConfigError(
            f"recipe {recipe.name}: {', '.join(map(repr, wrong))} cannot be the name of a field. "
            "Write names as text; quote one that YAML reads as a number or a truth value."
        )


def _option(recipe: Source) -> str:
    return _OWN if recipe.is_own else recipe.name


def _for_hydra(word: Word, literals: dict[str, str]) -> str:
    """The word as Hydra gets it. A path travels as a token, so no character of it is parsed."""
    if word.chooses_preset:
        return word.text
    if not word.is_path:
        return f"++{word.key}={word.value}"
    if word.path is None:
        return f"++{word.key}=null"
    token = f"literal-{len(literals)}-of-bioinit"
    literals[token] = word.path
    return f"++{word.key}={token}"


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with ``change`` applied to every text in it, keys left alone."""
    if isinstance(value, dict):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _escaped(text: str) -> str:
    """``text`` so that OmegaConf reads ``${`` in it as two characters."""
    return _INTERPOLATION.sub(lambda found: found[1] * 2 + "\\${", text)


@contextmanager
def _registered(recipe: Source) -> Iterator[dict[str, Document]]:
    """Recipes as options of Hydra's group ``recipe``, while it lasts.

    A folder outside ``conf/`` cannot be a group. A person's own Hydra application, if this runs in
    one, finds its Hydra as it was.
    """
    documents = {f"recipe/{name}": document for name, document in sources.ours().items()}
    if recipe.is_own:
        documents[f"recipe/{_OWN}"] = sources.parse(recipe.path, recipe.name)
    store, base = ConfigStore.instance(), copy(VersionBase.instance())
    theirs, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    before = store.repo.pop("recipe", None)
    try:
        for option, document in documents.items():
            group, _, leaf = option.rpartition("/")
            store.store(group=group, name=leaf, node=document.tree, package="_global_")
        defaults: list[Any] = [{group: None} for group in sources.GROUPS]
        store.store(name=_ROOT, node={"defaults": [*defaults, {"recipe": "???"}, "_self_"]})
        yield documents
    finally:
        store.repo.pop(f"{_ROOT}.yaml", None)
        store.repo.pop("recipe", None)
        if before is not None:
            store.repo["recipe"] = before
        GlobalHydra.instance().hydra = theirs
        VersionBase.set_instance(base)


@contextmanager
def _as_config_errors(recipe: Source) -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        cause = error.__cause__ if str(error) in ("", "None") and error.__cause__ else error
        reason = str(cause).strip().replace(f"'recipe/{_OWN}'", recipe.name)
        reason = reason.replace(f"'{_ROOT}'", "the run")
        cure = "Mend the recipe, or the override it comes from."
        if "default" in reason or "Could not find" in reason:
            cure = "A recipe chooses a preset in its defaults list: `- override /model: esm2_650m`."
        raise ConfigError(f"cannot compose recipe {recipe.name}: {reason}\n{cure}") from None


def _origins(
    merged: Sequence[str], documents: dict[str, Document], recipe: Source, words: Sequence[Word]
) -> dict[str, Origin]:
    """Who wrote each key: the parts in the order Hydra merged them, then the command line."""
    chosen = {word.key: word.text for word in words if word.chooses_preset}
    origins: dict[str, Origin] = {}
    for part in merged:
        group, _, option = part.partition("/")
        if group == "recipe":
            shown = recipe.name if option == _OWN else f"recipes/{option}.yaml"
            lines = documents[part].lines
            found = {k: Origin("recipe", f"{shown}:{n}") for k, n in lines.items()}
            origins.update((k, o) for k, o in found.items() if k not in _NOT_A_FIELD)
        elif group in sources.GROUPS:
            file = sources.shipped("conf") / f"{part}.yaml"
            lines = sources.parse(file, f"conf/{part}.yaml").lines
            for key, line in lines.items():
                where = f"conf/{part}.yaml:{line}"
                origins[f"{group}.{key}"] = _of_preset(group, where, chosen, recipe, documents)
    for word in words:
        if not word.chooses_preset:
            _claim(origins, word)
    return origins


def _of_preset(
    group: str, where: str, chosen: dict[str, str], recipe: Source, documents: dict[str, Document]
) -> Origin:
    """A preset is a default, unless a person chose it by name."""
    if group in chosen:
        return Origin("command line", f"{chosen[group]} ({where})")
    if recipe.is_own:
        listed = documents[f"recipe/{_OWN}"].tree.get("defaults") or []
        keys = [key for item in listed if isinstance(item, DictConfig) for key in item]
        if any(str(key).split()[-1].lstrip("/") == group for key in keys):
            return Origin("recipe", f"{recipe.name} ({where})")
    return Origin("default", where)


def _claim(origins: dict[str, Origin], word: Word) -> None:
    """The command line wrote this key, and with it every key inside it and around it."""
    origin = Origin("command line", word.text)
    value = None if word.is_path else word.parsed().value()
    if isinstance(value, dict):
        origins.update((f"{word.key}.{key}", origin) for key in sources.leaves(value))
    for key in [key for key in origins if key.startswith(f"{word.key}.")]:
        origins[key] = origin
    segments = word.key.split(".")
    for length in range(1, len(segments) + 1):
        key = ".".join(segments[:length])
        if key not in _NOT_A_FIELD:
            origins[key] = origin
