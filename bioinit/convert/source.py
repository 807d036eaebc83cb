"""What is converted: an open checkpoint, the config that counts for it, its fields in our words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bioinit import contexts, families
from bioinit.config import TrainableModelConfig
from bioinit.contexts import Checkpoint
from bioinit.contexts.protocol import Context
from bioinit.convert.proved import is_whole, proved, require_stated
from bioinit.errors import ConfigError
from bioinit.families.protocol import Family, ReadFields
from bioinit.layout import Dims
from bioinit.merge import Decision, merge
from bioinit.record import Origin, build, make_record
from bioinit.report import raise_for
from bioinit.save.beside import carried_fields
from bioinit.sides.sane import require_sane


@dataclass(frozen=True)
class Source:
    """A checkpoint that is being converted.

    ``dialect`` is whose spelling its names are; ``saved`` and ``context`` are None where nothing
    describes it. ``carried`` are fields that only one world has a word for, by dialect.
    """

    checkpoint: Checkpoint
    name: str
    family: Family
    context: Context | None
    config: TrainableModelConfig
    saved: ReadFields | None
    dialect: str
    decisions: tuple[Decision, ...]
    missing: tuple[str, ...]
    carried: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()
    """What was concluded or assumed where no saved config says it."""

    @property
    def shapes(self) -> dict[str, Dims]:
        return _shapes(self.checkpoint)


def find_context(checkpoint: Checkpoint, config: str | Path | None) -> Context | None:
    """The saved config that counts: the one that a person gives, or the checkpoint's own."""
    if config is None:
        return checkpoint.context
    said = contexts.read_file(config)
    own = checkpoint.context
    # Files beside the weights belong to them whoever describes the model.
    return said if own is None else replace(said, carried={**own.carried, **said.carried})


def find_family(checkpoint: Checkpoint, context: Context | None, asked: str | None) -> str:
    """The name of the family of ``checkpoint``.

    Raises:
        ConfigError: nobody says, or what says so describes a model of another family.
    """
    if asked is not None:
        if context is not None and not families.load(asked).recognizes(context):
            raise ConfigError(
                f"{context.where} describes {context.model!r}, which is not of the family "
                f"{asked!r}. Leave --family out, or give the model's own config with --config FILE."
            )
        return asked
    found = families.find(context, checkpoint.tensors)
    if found is not None:
        return found
    known = ", ".join(name for name in families.names() if name != "auto")
    what = (
        f"{checkpoint.path} has no saved config, and its names fit no family alone"
        if context is None
        else f"{context.where} describes {context.model!r}, which no family knows"
    )
    raise ConfigError(
        f"{what}. Say of which family it is with --family ({known}), and give its config with "
        "--config FILE, or its fields with --set FIELD=VALUE."
    )


def describe(
    checkpoint: Checkpoint,
    name: str,
    context: Context | None,
    given: Mapping[str, Any],
    architecture: str | None,
) -> Source:
    """The source as a config of its family describes it, ``given`` on top of what is saved.

    Raises:
        ConfigError: no such field, a value that does not fit, or nothing states what the model
            computes.
        PlanError: what is saved is no config of the family.
    """
    family = families.load(name)
    shapes = _shapes(checkpoint)
    cls = family.config_for(context)
    require_sane(given, "what was set", len(shapes))
    for said in () if context is None else (context, *context.beside):
        require_sane(said.data, said.where, len(shapes))
    saved = None if context is None else family.read_fields(context, shapes)
    fields = None if saved is None else saved.fields
    written = dict(given)
    if architecture is not None:
        written["architecture"] = architecture
    origins = {f"model.{field}": Origin("command line", "--set") for field in written}
    if context is not None:
        origins.setdefault("model.architecture", Origin("checkpoint", context.where))
    dialect = families.dialect_in(family, context, checkpoint.tensors)
    notes: tuple[str, ...] = ()
    if not is_whole(context) and family.dialects:
        make_record(cls, written, origins, at="model")  # a wrong name is the better message
        by_shapes = proved(family, dialect, cls, architecture, shapes)
        fields = {**by_shapes, **(fields or {})}
        shown = {n: f for n, f in by_shapes.items() if fields[n] is f and n not in written}
        who = _who(checkpoint, context)
        notes = require_stated(cls, {*fields, *written}, shown, dialect, who)

    def settled(raw: Mapping[str, Any]) -> tuple[TrainableModelConfig, Any]:
        merged = merge(make_record(cls, raw, origins, at="model"), fields, origins, "recipe")
        raise_for(merged.problems, "the config has")
        config: TrainableModelConfig = build(merged.record, at="model")
        return config, merged

    config, merged = settled(written)
    as_saved = None if context is None else _architecture(context)
    if as_saved is not None and "architecture" not in written:
        with_its_own, its_merged = settled({**written, "architecture": as_saved})
        if _is_buildable(family, with_its_own):
            config, merged = with_its_own, its_merged
        else:
            notes = (
                *notes,
                f"the saved config names the class {as_saved!r}, which the family {name!r} does "
                f"not have: the model is taken for a {config.architecture!r}. Say another with "
                "--architecture",
            )
    return Source(
        checkpoint,
        name,
        family,
        context,
        config,
        saved,
        dialect,
        merged.decisions,
        () if context is None else merged.missing,
        carried_fields(context, saved),
        notes,
    )


def _who(checkpoint: Checkpoint, context: Context | None) -> str:
    if context is None:
        return f"{checkpoint.path} has no saved config"
    return f"{context.where} says a part of the config only"


def _architecture(context: Context) -> str | None:
    """The class that a ``config.json`` names."""
    said = next((c for c in (context, *context.beside) if c.dialect == "hf"), None)
    named = None if said is None else said.data.get("architectures")
    return named[0] if isinstance(named, list) and named else None


def _is_buildable(family: Family, config: TrainableModelConfig) -> bool:
    try:
        family.body(config)
    except ConfigError:  # a head that this family's tables do not have
        return False
    return True


def _shapes(checkpoint: Checkpoint) -> dict[str, Dims]:
    return {n: t.shape for n, t in checkpoint.tensors.items() if t.kind == "weight"}
