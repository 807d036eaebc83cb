"""The plan of a conversion: which tensors the other world has, and where their elements lie."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bioinit.config import InitPolicy
from bioinit.convert.source import Source
from bioinit.errors import Problem
from bioinit.families.protocol import Canonical
from bioinit.formats._filling import SLAB_BYTES
from bioinit.keys import SkipPrefix
from bioinit.layout import Dims
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.plan import SKIP_LIST, STAGING_BYTES, LoadPlan, Model
from bioinit.plan import plan as plan_load
from bioinit.plan.spelled import Held, spelled_targets, whole_target
from bioinit.prefixes import Spelling
from bioinit.report import Unused
from bioinit.save.worlds import written_dialect
from bioinit.sides import solved
from bioinit.sides.said import about, notes_on
from bioinit.storage import worker_count
from bioinit.transforms.claims import across, promised
from bioinit.version import __version__

_CURES = {
    "unclaimed": "Give the config that the weights were trained with (--config FILE, --set "
    "FIELD=VALUE), or convert a checkpoint that has all of it.",
    "mismatch": "Give the config that the weights were trained with: --config FILE, or --set "
    "FIELD=VALUE.",
    "dtype": "Mend the checkpoint, or leave the tensor behind with --drop PREFIX.",
    "prefix": "Correct it in --drop, or leave it out.",
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """What will be written, and what of the source is left behind only if it is zero."""

    plan: LoadPlan
    zeros: tuple[str, ...] = ()


def plan(source: Source, to: str, dtype: torch.dtype | None, drop: Sequence[str]) -> Planned:
    """Decide which element of the source goes where in the dialect ``to``.

    Raises:
        ConfigError: the family has no such dialect to write, or it lacks a word for a tensor.
        AmbiguousFormat: the stored names can be read in two ways.
    """
    family, config = source.family, source.config
    dialect = written_dialect(family, source.name, to)
    assert family.tensors is not None  # it is written
    space = family.tensors(config)
    body = family.body(config)
    table = Table(dialect.rules(config, {}, body))
    read = family.dialects[source.dialect].rules

    def names_of(shapes: Mapping[str, Dims]) -> Names:
        return Names(Table(read(config, shapes, body)), table)

    wanted = {name: canonical.shape for name, canonical in space.items()}
    names, spelling = solved(names_of, tuple(table.spelled_out(wanted)), source.shapes)
    held = Held(source.checkpoint.tensors, names.disk, spelling.spell)
    made = promised(names.disk, map(spelling.spell, source.shapes), wanted)
    chosen = held.chosen(space, made)
    names, written = across(names, source.shapes, chosen, spelling.spell)
    targets = spelled_targets(written, table, held)
    planned = plan_load(
        Model(targets, lambda key: "nothing"),
        source.checkpoint.tensors,
        names,
        init=InitPolicy(),
        spelled=spelling.spell,
        skip_prefixes=drop,
        dtype=dtype or "stored",
        notes=[
            *notes_on(source.checkpoint, spelling, source.saved, source.missing),
            *source.notes,
            *_affine(names),
        ],
    )
    unclaimed, zeros = _left(planned, held, space, table, to)
    lost = _lost(source, names.disk, spelling, drop)
    problems = (*map(_in_words, planned.problems), *unclaimed, *lost)
    return Planned(_finished(planned, source, problems), zeros)


def plan_as_it_is(source: Source, dtype: torch.dtype | None, drop: Sequence[str]) -> Planned:
    """Every tensor under its own name, for a model that no family has a table of."""
    stored = source.checkpoint.tensors
    identity = Table.identity()
    targets = {
        name: whole_target(name, tensor.shape, tensor.dtype)
        for name, tensor in stored.items()
        if tensor.kind == "weight"
    }
    planned = plan_load(
        Model(targets, lambda key: "nothing"),
        stored,
        Names(identity, identity),
        init=InitPolicy(),
        skip_prefixes=drop,
        dtype=dtype or "stored",
        notes=notes_on(source.checkpoint, Spelling({}), source.saved, ()),
    )
    return Planned(_finished(planned, source, tuple(map(_in_words, planned.problems))))


def _finished(planned: LoadPlan, source: Source, problems: Sequence[Problem]) -> LoadPlan:
    """The plan with what it says of its source."""

    @functools.cache
    def header() -> Mapping[str, Any]:
        return {"bioinit": __version__, "checkpoint": about(source.checkpoint, source.name)}

    kept = {
        key: target for key, target in planned.targets.items() if target.claim.claim != "skipped"
    }
    return dataclasses.replace(
        planned,
        targets=kept,
        problems=tuple(problems),
        fields=source.decisions,
        files=tuple(str(file.path) for file in source.checkpoint.files),
        header=header,
        memory_peak=worker_count() * (SLAB_BYTES + 2 * STAGING_BYTES),
    )


def _left(
    planned: LoadPlan, held: Held, space: Mapping[str, Canonical], table: Table, to: str
) -> tuple[list[Problem], tuple[str, ...]]:
    """What becomes of stored tensors that no target wanted: problems, and those to be zero."""
    problems: list[Problem] = []
    zeros: list[str] = []
    for unused in planned.unused:
        name, shape, dtype, parts = unused
        if parts:
            problems += _of_parts(unused, space)
            continue
        keys = held.by_name.get(name, ())
        kind = held.kind_of(name, space)
        if kind == "computed":
            continue
        if kind == "zero":
            zeros.append(name)
            continue
        if not keys:
            why = "nobody knows it"
        elif any(table.spells(key) for key in keys):
            why = f"the config has no place for it (it would be {keys[0]!r})"
        else:
            why = f"{to} has no word for it"
        problems.append(
            Problem(
                "unused",
                name,
                f"the source holds {name!r} {list(shape)} {dtype}, and {why}.",
                "Correct the config (--config FILE, --set FIELD=VALUE), or leave it behind with "
                f"--drop {name.rpartition('.')[0] or name}.",
            )
        )
    return problems, tuple(zeros)


def _lost(
    source: Source, table: Table, spelling: Spelling, drop: Sequence[str]
) -> Iterator[Problem]:
    """What was trained and no other world has a model for: it is left behind only if asked."""
    skips = [SkipPrefix(text) for text in drop]
    for name, shape in source.shapes.items():
        rule = table.rule_for(spelling.spell(name))
        if rule is None or not rule.is_loss or any(skip.matches(name) for skip in skips):
            continue
        yield Problem(
            "unused",
            name,
            f"the source holds {name!r} {list(shape)}: {rule.note}, which would be lost.",
            f"Leave it behind with --drop {name.rpartition('.')[0]}.",
        )


def _of_parts(unused: Unused, space: Mapping[str, Canonical]) -> Iterator[Problem]:
    """Layers or experts for which nobody has a place, inside of a tensor that is used."""
    is_known = [part in space and space[part].kind == "computed" for part in unused.parts]
    if not all(is_known):
        yield Problem(
            "unused",
            unused.key,
            f"the source holds {unused.key!r} {list(unused.shape)} {unused.dtype}, and the config "
            f"has no place for a part of it: {', '.join(unused.folded)}.",
            "Give the config that the weights were trained with: --config FILE, or --set "
            "FIELD=VALUE.",
        )


def _affine(names: Names) -> Iterator[str]:
    """What is not copied bit by bit: weights that one world stores around another zero."""
    added = {
        part.add for table in names[:2] for rule in table.rules for part in rule.parts if part.add
    }
    if added:
        yield (
            "norm weights are stored around another zero, and are converted by an addition: "
            + ", ".join(f"{value:+g}" for value in sorted(added))
            + ". They are exact in float32, and rounded where they are narrower"
        )


def _in_words(problem: Problem) -> Problem:
    """A problem with its cure in the words of ``convert``."""
    cure = _CURES.get(problem.kind, problem.cure)
    message = problem.message.replace(SKIP_LIST, "--drop")
    return dataclasses.replace(problem, message=message, cure=cure)


__all__ = ["Planned", "plan", "plan_as_it_is"]
