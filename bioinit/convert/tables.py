"""The plan of a conversion: which tensors the other world has, and where their elements lie."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from bioinit.config import InitPolicy
from bioinit.convert.source import Source, writers
from bioinit.errors import ConfigError, MappingError, Problem
from bioinit.families.protocol import Canonical
from bioinit.formats._filling import SLAB_BYTES
from bioinit.formats.protocol import StoredTensor
from bioinit.initialize.said import about, notes_on
from bioinit.initialize.sides import solved
from bioinit.keys import template
from bioinit.layout import Box, Dims, numel
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.plan import SKIP_LIST, STAGING_BYTES, LoadPlan, Model
from bioinit.plan import plan as plan_load
from bioinit.prefixes import Spelling
from bioinit.storage import worker_count
from bioinit.targets import Target
from bioinit.transforms.claims import across, promised
from bioinit.version import __version__

_HEAD = {"needed": 0, "zero": 0}
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

    @property
    def common_dtype(self) -> torch.dtype | None:
        """The floating dtype that most elements will have."""
        counts: dict[torch.dtype, int] = {}
        for target in self.plan.targets.values():
            if target.dtype.is_floating_point:
                counts[target.dtype] = counts.get(target.dtype, 0) + numel(target.claim.shape)
        return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def plan(source: Source, to: str, dtype: torch.dtype | None, drop: Sequence[str]) -> Planned:
    """Decide which element of the source goes where in the dialect ``to``.

    Raises:
        ConfigError: the family has no such dialect to write, or it lacks a word for a tensor.
        AmbiguousFormat: the stored names can be read in two ways.
    """
    family, config = source.family, source.config
    if to not in writers(family) or family.tensors is None:
        raise _unwritten(source, to)
    space = family.tensors(config)
    body = family.body(config)
    table = Table(family.dialects[to].rules(config, {}, body))
    read = family.dialects[source.dialect].rules

    def names_of(shapes: Mapping[str, Dims]) -> Names:
        return Names(Table(read(config, shapes, body)), table)

    wanted = {name: canonical.shape for name, canonical in space.items()}
    names, spelling = solved(names_of, tuple(table.spelled_out(wanted)), source.shapes)
    held = _Held(source.checkpoint.tensors, names.disk, spelling)
    made = promised(names.disk, map(spelling.spell, source.shapes), wanted)
    chosen = {
        name: canonical.shape
        for name, canonical in space.items()
        if canonical.kind in _HEAD or name in held.extents or name in made
    }
    known = {template(name) for name in space}
    chosen |= {k: shape for k, shape in held.extents.items() if template(k) not in known}
    names, written = across(names, source.shapes, chosen, spelling.spell)
    targets = _targets(written, table, held)
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
            *_affine(names),
        ],
    )
    unclaimed, zeros = _left(planned, held, space, table, to)
    problems = (*map(_in_words, planned.problems), *unclaimed)
    return Planned(_finished(planned, source, problems), zeros)


def plan_as_it_is(source: Source, dtype: torch.dtype | None, drop: Sequence[str]) -> Planned:
    """Every tensor under its own name, for a model that no family has a table of."""
    stored = source.checkpoint.tensors
    identity = Table.identity()
    targets = {
        name: _target(name, tensor.shape, tensor.dtype)
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


class _Held:
    """The canonical tensors that a checkpoint holds: how far they reach, and their dtypes."""

    def __init__(self, stored: Mapping[str, StoredTensor], disk: Table, spelling: Spelling) -> None:
        self.extents: dict[str, Dims] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.by_name: dict[str, tuple[str, ...]] = {}
        for name, tensor in stored.items():
            if tensor.kind != "weight":
                continue
            try:
                placed = disk.place(spelling.spell(name), (Box.contiguous(tensor.shape),)) or []
            except MappingError:
                continue  # the plan says so
            self.by_name[name] = tuple(dict.fromkeys(key for key, _, _ in placed))
            for key, box, _ in placed:
                ends = tuple(map(int.__add__, box.offsets, box.sizes))
                before = self.extents.get(key, ends)
                same = len(before) == len(ends)
                self.extents[key] = tuple(map(max, before, ends)) if same else before
                self.dtypes.setdefault(key, tensor.dtype)


def _targets(spelled: Mapping[str, Dims], table: Table, held: _Held) -> dict[str, Target]:
    found = {}
    dtypes: dict[str, torch.dtype] = {}
    for key, shape in spelled.items():
        kind = template(key)
        if kind not in dtypes:
            placed = table.place(key, (Box.contiguous(shape),)) or []
            known = (held.dtypes[name] for name, _, _ in placed if name in held.dtypes)
            dtypes[kind] = next(known, torch.float32)
        found[key] = _target(key, shape, dtypes[kind])
    return found


def _target(key: str, shape: Dims, dtype: torch.dtype) -> Target:
    return Target(key, shape, dtype, (Box.contiguous(shape),), False, True, None)


def _left(
    planned: LoadPlan, held: _Held, space: Mapping[str, Canonical], table: Table, to: str
) -> tuple[list[Problem], tuple[str, ...]]:
    """What becomes of stored tensors that no target wanted: problems, and those to be zero."""
    problems: list[Problem] = []
    zeros: list[str] = []
    for name, shape, dtype in planned.unused:
        keys = held.by_name.get(name, ())
        kinds = {space[key].kind for key in keys if key in space}
        if keys and len(kinds) == 1 and all(key in space for key in keys):
            if kinds == {"computed"}:
                continue
            if kinds == {"zero"}:
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


def _unwritten(source: Source, to: str) -> ConfigError:
    known: Collection[str] = writers(source.family)
    why = source.family.absent.get(to)
    if not known:
        return ConfigError(
            f"the family {source.name!r} has no tables of other worlds: its models stay in the "
            f"dialect they are in, and {to!r} is another. A family of its own in the entry-point "
            "group bioinit.families adds them."
        )
    return ConfigError(
        f"the family {source.name!r} cannot be written in the dialect {to!r}"
        + (f": {why}. " if why else ". ")
        + f"Choose from {', '.join(known)}."
    )


__all__ = ["Planned", "plan", "plan_as_it_is"]
