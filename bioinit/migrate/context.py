"""The saved config of an old checkpoint, as a recipe of ours that starts the same model.

A recipe does not repeat what the checkpoint says itself: when it runs, that is read again and
merged. So what is in force here is the recipe of the family, the path, and what no saved config is
asked for (the head). Fields that come from the checkpoint are remarks, and so is what became of the
others and of every class that the file names. Nothing of them is imported.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bioinit import families
from bioinit.contexts import Checkpoint
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError, UnknownFormat
from bioinit.families.protocol import ReadFields
from bioinit.keys import suggestion
from bioinit.migrate.page import Page, listed, literally, shown
from bioinit.recipe import sources
from bioinit.record import is_config, specs
from bioinit.record import shown as plain
from bioinit.sides.sane import require_sane

_CONTEXT = "context"
_PRIMARY = ("masked_lm", "causal_lm")
_ENDS = {
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}
"""Ends of transformers' class names, and the task that a recipe of a named family has for them."""

_AS_SAVED = "auto/as_saved"
_LISTS = "initial_ckpt_skip_keys_with_these_prefixes"
_FINE_TUNED = ("ESM2FineTuneSeqConfig", "ESM2FineTuneTokenConfig", "FineTuneSeqLenBioBertConfig")
_ROLES = (
    ("model.config", "the model's config, or a part of it"),
    ("model.tokenizer", "a tokenizer: its files go along when the model is saved"),
    ("model.model_construct_args.tokenizer", "a tokenizer: of it, only its size is asked for"),
    ("model.optim", "an optimizer: that is your trainer's"),
    ("model.optimizer", "an optimizer: that is your trainer's"),
    ("model", "what trained the model: bioinit builds the model alone"),
    ("trainer", "the trainer, and what it was made of: yours takes its place"),
    ("extra", "data, and what else the run had: yours take its place"),
    ("optim", "an optimizer: that is your trainer's"),
)
"""What classes at these places of a saved tree are for."""

_SIZES = ("num_layers", "hidden_size", "num_attention_heads")
"""Sizes that no default can stand for."""

_NO_ROLE = "nothing here asks for it"
_MOST_CLASSES = 40


@dataclasses.dataclass(frozen=True)
class _Start:
    """How the recipe begins: on which of ours it builds, and what it sets besides the path."""

    recipe: str | None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    why: str = ""


def migrate_context(path: str | Path) -> str:
    """A recipe, as YAML, that starts the model of the checkpoint at ``path``.

    Args:
        path: the checkpoint's folder or file; its ``context/`` serves as well.

    Raises:
        StorageError: there is nothing.
        CheckpointError: it cannot be used, or has no saved config.
        ConfigError: no family here knows the class that the saved config names.
    """
    path = Path(os.path.expanduser(path))
    if path.name == _CONTEXT and os.path.isdir(path):
        path = path.parent
    with families.open_checkpoint(path) as checkpoint:
        context = checkpoint.context
        if context is None:
            raise UnknownFormat(
                f"{path} holds weights, and no saved config that says what model they are. Put the "
                "config beside them, or write a recipe of a family yourself (`bioinit recipes`)."
            )
        for said in (context, *context.beside):
            require_sane(said.data, said.where, len(checkpoint.tensors))
        name = families.find(context, checkpoint.tensors)
        if name is None:
            raise _unknown_class(checkpoint, context)
        family = families.load(name)
        shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
        saved = family.read_fields(context, shapes)
        cls = family.config_for(context)
        start = _start(name, context)
    page = Page()
    page.remark(f"The model of {path}, started by bioinit. Save this as mine.yaml, look at it with")
    page.remark("  bioinit plan recipe=./mine.yaml")
    page.remark("and start it with")
    page.remark("  bioinit init recipe=./mine.yaml output_dir=runs/start")
    page.remark(f"Its config was read from {context.where}" + _named(context) + ".")
    for other in context.beside:
        page.remark(f"Beside it lies {other.where}, which says less and was not preferred.")
    _write_start(page, name, start, path)
    _write_fields(page, context, cls, saved)
    _write_account(page, saved)
    _write_classes(page, context)
    return page.text


def _named(context: Context) -> str:
    return "" if context.model is None else f" ({context.dialect}: {context.model})"


def _unknown_class(checkpoint: Checkpoint, context: Context) -> ConfigError:
    """Nobody here knows the model: say its class, and both ways on."""
    known = [name for name in families.names() if name != "auto"]
    model = context.model or "a model without a name"
    if context.dialect == "bioinit":
        return ConfigError(
            f"{context.where} holds a config of the class {model}, which is of no family here "
            f"({', '.join(known)}) and is not imported because a file names it. If it is yours and "
            "you trust it, name it yourself: a recipe with `model: {_target_: "
            f"{model}, initial_ckpt_path: {checkpoint.path}}}` starts the same model."
        )
    short = model.rpartition(".")[2].lower()
    near = suggestion(short, known)
    return ConfigError(
        f"{context.where} describes {model} in the dialect {context.dialect!r}, and no family here "
        f"({', '.join(known)}) knows that class. {near} A family of your own is one file "
        "(docs/connectors.md); bioinit.load_weights(module, path) loads it into a module of yours."
    )


def _start(family: str, context: Context) -> _Start:
    """The recipe of ours that makes the same kind of model."""
    if context.dialect == "bioinit":
        return _of_ours(family, context)
    if family == "auto":
        return _Start(_AS_SAVED)
    if context.dialect == "hf":
        named = (context.data.get("architectures") or [None])[0]
        task = next((t for end, t in _ENDS.items() if str(named).endswith(end)), None)
        if named is None or (task and f"{family}/{task}" in sources.names()):
            return _Start(_primary(family, task))
        return _Start(_AS_SAVED, why=f"the family {family} as well, whole, as the {named} it is")
    return _fine_tuned(family, context) or _Start(_primary(family))


def _primary(family: str, task: str | None = None) -> str | None:
    """The family's recipe for ``task``, or for the one that it was trained with first."""
    wanted = [f"{family}/{each}" for each in ((task,) if task else _PRIMARY)]
    return next((name for name in wanted if name in sources.names()), None)


def _of_ours(family: str, context: Context) -> _Start:
    """What our own context says and no merge takes from it: the head."""
    architecture = context.data.get("architecture")
    if family == "auto":
        fields = {} if architecture is None else {"architecture": architecture}
        return _Start(_AS_SAVED, {**fields, **_head(context)})
    recipe = _primary(family, architecture) if isinstance(architecture, str) else _primary(family)
    if recipe is not None and recipe.rpartition("/")[2] in _PRIMARY:
        return _Start(recipe, _head(context))
    fields = {"architecture": architecture, **_head(context), _LISTS: []}
    return _Start(
        recipe or _primary(family), fields, "its head is in the checkpoint, so it is read"
    )


def _head(context: Context) -> dict[str, Any]:
    labels, count = context.data.get("labels"), context.data.get("num_labels")
    if labels:
        return {"labels": list(labels)}
    return {} if count is None else {"num_labels": count}


def _fine_tuned(family: str, context: Context) -> _Start | None:
    """BioNeMo's classes with a head of its own; None for any other."""
    kind = str((context.raw or {}).get("canonical") or "").rpartition(".")[2]
    if kind not in _FINE_TUNED:
        return None
    data = context.data
    why = (
        f"the head of {kind} has layers that no class of transformers has, so a new one takes its "
        "place"
    )
    if kind == "ESM2FineTuneTokenConfig":
        count = data.get("cnn_num_classes", 3)
        return _Start(f"{family}/token_classification", {"num_labels": count}, why)
    if kind == "ESM2FineTuneSeqConfig" and data.get("task_type") == "classification":
        count = data.get("mlp_target_size", 1)
        return _Start(f"{family}/sequence_classification", {"num_labels": count}, why)
    return _Start(f"{family}/regression", {}, why)


def _write_start(page: Page, family: str, start: _Start, path: Path) -> None:
    page.gap()
    if start.recipe is None:
        page.says("family", family)
    else:
        page.opens("defaults")
        page.item(f"/recipe/{start.recipe}")
        if not start.recipe.startswith("auto/"):
            page.remark("no preset of sizes: all of them are the checkpoint's", depth=1)
            page.item({"override /model": None})
        page.item("_self_")
    page.gap()
    page.opens("model", start.why)
    page.says("initial_ckpt_path", literally(str(path.absolute())), depth=1)
    for name, value in start.fields.items():
        page.says(name, literally(plain(value)), depth=1)


def _write_fields(page: Page, context: Context, cls: type, saved: ReadFields) -> None:
    """The fields that the merge takes from the checkpoint, and those that it leaves to us."""
    known = {name: spec for name, spec in specs(cls).items() if spec.init and not spec.marks.own}
    page.remark("Taken from the checkpoint. To set one, take its # off and list its name in", 1)
    page.remark("override_parent_fields: the weights were trained with what stands here.", 1)
    for name in known:
        field = saved.fields.get(name)
        if field is None:
            continue
        value = plain(field.value)
        where = field.where.replace(context.where, Path(context.where).name)
        if not field.literal:
            where = f"not stated; from {where}"
        if isinstance(value, dict | list) and (not value or is_config(field.value)):
            continue
        page.would_say(name, literally(value), where, depth=1)
    silent = [name for name in known if name not in saved.fields]
    for name in (each for each in _SIZES if each in silent):
        page.says(name, "???", "the saved config does not say it: fill it in", depth=1)
        silent.remove(name)
    if silent:
        page.remark(f"Not said there, so as {cls.__name__} has them: {listed(silent)}.", 1)


def _write_account(page: Page, saved: ReadFields) -> None:
    """What became of the fields that are none of ours."""
    groups: dict[tuple[str, str], list[str]] = {}
    for field in saved.account:
        if field.fate != "mapped":
            groups.setdefault((field.fate, field.note), []).append(field.name)
    if not groups:
        return
    page.gap()
    page.remark("Fields of the saved config that are none of this recipe:")
    for (fate, note), names in sorted(groups.items(), key=lambda item: item[0][0] != "unknown"):
        page.remark(f"- {_FATES[fate]} ({note}): {listed(names)}")


_FATES = {
    "unknown": "unknown",
    "carried": "goes along beside the weights",
    "ignored": "has no effect here",
}


def _write_classes(page: Page, context: Context) -> None:
    """Every other class that the saved config names, and what takes its place."""
    found: dict[str, str] = {}
    for said in (context, *context.beside):
        for at, name in _classes(said.tree, ""):
            if name != context.model:
                found.setdefault(name, at)
    if not found:
        return
    page.gap()
    page.remark("Classes that the saved config names. None was imported, and none is needed:")
    for name, at in list(found.items())[:_MOST_CLASSES]:
        role = next((r for start, r in _ROLES if f"{at}.".startswith(f"{start}.")), _NO_ROLE)
        page.remark(f"- {shown(name)} (at {shown(at)}): {role}" if at else f"- {shown(name)}")
    if len(found) > _MOST_CLASSES:
        page.remark(f"- and {len(found) - _MOST_CLASSES} more")


def _classes(tree: Any, at: str) -> Iterator[tuple[str, str]]:
    """The place and the name of every class in a saved tree."""
    if isinstance(tree, Mapping):
        name = tree.get("_target_")
        if isinstance(name, str):
            yield at, name
        for key, value in tree.items():
            yield from _classes(value, f"{at}.{key}" if at else str(key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _classes(value, f"{at}.{number}")
