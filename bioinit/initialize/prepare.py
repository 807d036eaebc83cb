"""Everything that is known before a weight byte is read: configs merged, model built, plan made."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl
from torch import nn

from bioinit import collector, families
from bioinit.backends.protocol import Backend, Make, built_class
from bioinit.config import InitPolicy, Run, TrainableModelConfig
from bioinit.contexts import Checkpoint
from bioinit.errors import ConfigError, Problem
from bioinit.families.protocol import Family
from bioinit.formats.protocol import StoredTensor
from bioinit.initialize.across import described_by, names_across
from bioinit.initialize.division import Division, Parallelize, require_alike
from bioinit.initialize.facts import facts, loading_facts
from bioinit.initialize.layers import Layers
from bioinit.initialize.once import Opened, Progress, opened
from bioinit.initialize.outputs import across_for
from bioinit.keys import Pattern, suggestion
from bioinit.load import reset_parameters
from bioinit.merge import merge
from bioinit.plan import SKIP_LIST, LoadPlan
from bioinit.plan import plan as plan_load
from bioinit.prefixes import Spelling
from bioinit.ranks import ALONE, World
from bioinit.record import build, make_record, set_in
from bioinit.save.across import Across
from bioinit.save.plain import Plain
from bioinit.sides import model_side, names_of_family, names_of_module
from bioinit.sides.given import Given
from bioinit.sides.said import about, notes_on
from bioinit.sides.sane import require_sane
from bioinit.storage import File
from bioinit.targets import describe, is_divided, slots
from bioinit.version import __version__

_NOTHING: Mapping[str, Any] = {}


@dataclass
class Prepared:
    """A module on meta (or a person's own, as it came), and what will be done with it."""

    run: Run
    config: TrainableModelConfig
    record: Any
    """The merged record of the model: what the next saved context holds."""
    module: nn.Module
    make: Make
    backend: Backend
    checkpoint: Checkpoint | None
    plan: LoadPlan
    spelling: Spelling
    across: Across | Plain | None = None
    """How the model is written; None for a module of somebody's own."""
    division: Division = dataclasses.field(default_factory=Division)
    """Who shares the model, and how it is divided."""
    named: tuple[Path, ...] = ()
    """Where what the checkpoint was converted from lies."""

    @property
    def files(self) -> Sequence[File]:
        return () if self.checkpoint is None else self.checkpoint.files

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {} if self.checkpoint is None else self.checkpoint.tensors

    @property
    def spelled_names(self) -> Sequence[str]:
        """The stored names as the dialect spells them: without what wrappers added."""
        return [self.spelling.spell(name) for name in self.tensors]

    def whole(self) -> nn.Module:
        """The model on meta, undivided and new."""
        return self.backend.build(self.make)


@contextmanager
def prepare(
    record: fdl.Config[Run],
    world: World = ALONE,
    parallelize: Parallelize | None = None,
    *,
    converts: bool = True,
    progress: Progress | None = None,
) -> Iterator[Prepared]:
    """Decide everything about a run; its checkpoint is open inside.

    Args:
        record: of the run.
        world: the ranks that share its model; all of them call this.
        parallelize: divides the model on meta in place of ``placement.strategy``.
        converts: whether what ``init.convert`` asks for is done now, where it is not in the cache.
        progress: is told of a conversion.
    """
    started = time.perf_counter()
    run: Run = build(record)
    path = run.model.get("initial_ckpt_path") if isinstance(run.model, Mapping) else None
    path = path or getattr(run.model, "initial_ckpt_path", None)
    if path is None:
        yield _decide(record, run, None, started, world, parallelize)
        return
    with opened(
        path,
        record,
        run,
        lambda: _family(record, run),
        world,
        converts=converts,
        progress=progress,
    ) as found:
        with collector.paused():
            prepared = _decide(record, run, found, started, world, parallelize)
        yield prepared


def is_shared(module: nn.Module) -> bool:
    """Whether ``module`` is what this process has of a model that several share."""
    backend, _ = families.of_module(module)
    return any(is_divided(s.tensor) for s in slots(module)) or bool(backend.located(module))


def prepare_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    init: InitPolicy,
    skip_prefixes: tuple[str, ...],
    mapping: Given | None,
    world: World = ALONE,
) -> Prepared:
    """Decide everything about loading into a module that exists already."""
    started = time.perf_counter()
    backend, own_names = families.of_module(module)
    if mapping is None:
        own_names = names_across(module, checkpoint) or own_names
    targets = describe(module, backend.located(module))
    division = Division(world)
    if world.size > 1:
        world.agree(loading_facts(init, skip_prefixes, checkpoint))
        require_alike(module, world)
    names, spelling = names_of_module(module, targets, checkpoint, own_names, mapping)
    if own_names is None or families.is_megatron(module):
        backend = dataclasses.replace(
            backend, initialize=reset_parameters, describe_init=_describe_reset
        )
    planned = plan_load(
        model_side(module, targets, backend, None),
        checkpoint.tensors,
        names,
        init=init,
        spelled=spelling.spell,
        skip_prefixes=skip_prefixes,
        dtype="module",
        notes=notes_on(checkpoint, spelling),
        share=division.share,
    )
    planned = _finished(planned, init, checkpoint, None, started, {})
    words = [dataclasses.replace(p, cure=_in_keywords(p.cure)) for p in planned.problems]
    planned = dataclasses.replace(planned, problems=tuple(words))
    config = TrainableModelConfig()
    return Prepared(
        Run(),
        config,
        None,
        module,
        lambda: module,
        backend,
        checkpoint,
        planned,
        spelling,
        division=division,
    )


def _describe_reset(module: nn.Module, key: str) -> str | None:
    """What gives a key of a module without its constructor its value, if it is not loaded."""
    owner = module.get_submodule(key.rpartition(".")[0])
    name = key.rpartition(".")[2]
    if not {**owner._parameters, **owner._buffers}[name].is_meta:  # type: ignore[union-attr]
        return "the module, as it was"
    resets = hasattr(owner, "reset_parameters")
    return f"{built_class(owner).__name__}.reset_parameters" if resets else None


def _in_keywords(cure: str) -> str:
    """A cure in the words of ``load_weights``, whose keywords are not the keys of a recipe."""
    return re.sub(r"\binit\.(?=\w)", "", cure.replace(SKIP_LIST, "skip_prefixes"))


def _decide(
    record: fdl.Config[Run],
    run: Run,
    found: Opened | None,
    started: float,
    world: World,
    parallelize: Parallelize | None,
) -> Prepared:
    checkpoint = None if found is None else found.checkpoint
    kept = None if found is None else found.key
    if world.size > 1:
        world.agree(facts(run, checkpoint, parallelize, kept))
    context = None if checkpoint is None else checkpoint.context
    family = _family(record, run)
    if context is not None and checkpoint is not None:
        for said in (context, *context.beside):
            require_sane(said.data, said.where, len(checkpoint.tensors))
    if context is not None and not family.recognizes(context):
        raise _of_another_family(run, checkpoint)
    model = record.model
    if not isinstance(model, fdl.Buildable):
        model = make_record(family.config_for(context), model or {}, run.origins, at="model")
    shapes = {} if checkpoint is None else {n: t.shape for n, t in checkpoint.tensors.items()}
    saved = None if context is None else family.read_fields(context, shapes)
    described = None
    if context is not None and saved is not None:
        # What the saved config leaves open is as this run says.
        stated = {name for name, field in saved.fields.items() if field.literal}
        left = {name: value for name, value in set_in(model).items() if name not in stated}
        described = described_by(family, context, left, shapes)
    layers = None if run.init.layers is None else Layers(run.init.layers, saved)
    if layers is not None and saved is not None:
        saved = layers.counted(saved)
    merged = merge(
        model, None if saved is None else saved.fields, run.origins, run.init.on_conflict
    )
    config: TrainableModelConfig = build(merged.record, at="model")
    backend = family.backend(config)

    def make() -> nn.Module:
        return family.build(config)

    division = Division.of(run, config, world, parallelize)
    division.meet(backend)
    module = backend.build(make)
    # Names and layouts are those of the whole model; what this rank holds of it comes after.
    whole = describe(module, backend.located(module))
    names, spelling = names_of_family(family, config, described, module, whole, checkpoint)
    nothing = checkpoint is None
    stored: Mapping[str, StoredTensor] = {} if checkpoint is None else checkpoint.tensors
    told = () if found is None else found.notes
    notes = [*told, *division.notes(), *notes_on(checkpoint, spelling, saved, merged.missing)]
    is_left: Callable[[str], bool] = frozenset[str]().__contains__
    if layers is not None:
        is_left = layers.is_left(module)
        stored, about_layers = layers.of(stored, names, spelling, module)
        names = layers.renumbered(names, module)
        notes.append(about_layers)
    module, targets = division.divided(module, whole, backend, family)
    planned = plan_load(
        model_side(module, targets, backend, run.placement.dtype),
        stored,
        names,
        init=dataclasses.replace(run.init, on_missing="init") if nothing else run.init,
        spelled=spelling.spell,
        skip_prefixes=config.initial_ckpt_skip_keys_with_these_prefixes,
        dtype=run.placement.dtype or ("module" if nothing else "stored"),
        notes=notes,
        is_left=is_left,
        share=division.share,
    )
    converted = {} if found is None or found.said is None else {"converted_from": found.said}
    planned = _finished(
        planned, run.init, checkpoint, run.family, started, division.said(), converted
    )
    empty = [] if planned.tensors or nothing else [_nothing_to_load_into(module)]
    problems = (*merged.problems, *empty, *planned.problems)
    across = across_for(run, family, config, checkpoint, saved)
    # Whoever only wants the model in memory need not be told what could not be written.
    if not problems and (run.output_dir or run.output.dialect != "hf"):
        problems = across.problems(module, backend.located(module), world)
    planned = dataclasses.replace(planned, fields=merged.decisions, problems=problems)
    return Prepared(
        run,
        config,
        merged.record,
        module,
        make,
        backend,
        checkpoint,
        planned,
        spelling,
        across,
        division,
        () if found is None else found.named,
    )


def _nothing_to_load_into(module: nn.Module) -> Problem:
    kind = built_class(module).__name__
    return Problem(
        "unclaimed",
        kind,
        f"{kind} has no parameter and no buffer, so nothing can be loaded into it.",
        "Name a class that is a whole model in model.architecture, or in your configure_model().",
    )


def _family(record: fdl.Config[Run], run: Run) -> Family:
    if run.family is not None:
        return families.load(run.family)
    if isinstance(record.model, fdl.Buildable):
        return families.of_config(fdl.get_callable(record.model))
    raise ConfigError(
        "nobody says what family the model is of. Write `family:` in the recipe, one of "
        f"{', '.join(families.names())}, or give a config class of your own."
    )


def _of_another_family(run: Run, checkpoint: Checkpoint | None) -> ConfigError:
    assert checkpoint is not None and checkpoint.context is not None
    context = checkpoint.context
    fitting = families.find(context, checkpoint.tensors)
    if fitting is None and context.dialect not in ("hf", "bioinit"):
        return ConfigError(
            f"{context.where} describes {context.model or 'its model'} in the dialect "
            f"{context.dialect!r}, and no family here ({', '.join(families.names())}) knows that "
            "class. `bioinit inspect` shows what is stored; bioinit.load_weights(module, path) "
            "loads it into a module of yours, and a family of your own is one file."
        )
    if context.model is None and fitting is None:
        return ConfigError(
            f"{context.where} names no model_type (a text), so the family {run.family!r} cannot "
            "say what the model is. Add the model_type to the file, or use a recipe of a named "
            f"family: {', '.join(name for name in families.names() if name != 'auto')}."
        )
    why = families.load(run.family).apart.get(fitting or "") if run.family else None
    cure = f"Use a recipe of the family {fitting!r}."
    if fitting in (None, run.family):
        cure = "If it is of a class of your own, use a recipe with `model: {_target_: ...}`."
    return ConfigError(
        f"{checkpoint.path} holds a model of type {context.model!r} ({context.where}), which is "
        f"not of the family {run.family!r}{f': {why}' if why else ''}. {cure}"
    )


def _finished(
    planned: LoadPlan,
    init: InitPolicy,
    checkpoint: Checkpoint | None,
    family: str | None,
    started: float,
    placement: Mapping[str, Any],
    converted: Mapping[str, Any] = _NOTHING,
) -> LoadPlan:
    """The plan with what only the whole of it knows: files, header, idle patterns, time."""
    return dataclasses.replace(
        planned,
        problems=(*planned.problems, *_idle_patterns(init, planned)),
        files=() if checkpoint is None else tuple(str(file.path) for file in checkpoint.files),
        header=functools.cache(
            lambda: {
                "bioinit": __version__,
                "checkpoint": about(checkpoint, family),
                **converted,
                **placement,
            }
        ),
        seconds=round(time.perf_counter() - started, 6),
    )


def _idle_patterns(init: InitPolicy, planned: LoadPlan) -> Iterator[Problem]:
    keys = [claim.key for claim in planned.tensors if claim.claim != "tied"]
    for field in ("trainable", "frozen"):
        for text in getattr(init, field):
            pattern = Pattern(text)
            if not any(pattern.match(key) is not None for key in keys):
                yield Problem(
                    "pattern",
                    text,
                    f"init.{field} holds {text!r}, which matches no parameter. "
                    f"{suggestion(text, keys)}".strip(),
                    "A pattern matches whole keys: * is one segment, ** one or more.",
                )
