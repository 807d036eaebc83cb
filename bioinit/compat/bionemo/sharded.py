"""What a model of megatron-core says of its own names on disk.

``sharded_state_dict()`` gives for every parameter the name that checkpoints have for it, which axes
they put in front (layers, experts), and which of the whole this process holds. From that follows a
table of names for any model of megatron-core, also for one whose class nobody else knows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bioinit import families
from bioinit.backends.megatron import imported, located, require_world
from bioinit.backends.megatron.located import stages
from bioinit.contexts import Checkpoint
from bioinit.errors import PlanError, Problem
from bioinit.keys import SkipPrefix, escape, numbers, template
from bioinit.layout import Dims
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.rules import Each, Narrow, Part, Rule, rename

logger = logging.getLogger(__name__)

FRONTS = ("module.", "", "model.", "module.module.")
"""What trainers put in front of a model's names, the likeliest first."""


@dataclass(frozen=True)
class _Entry:
    """A parameter: its name in the whole model and on disk, and the shapes there."""

    key: str
    on_disk: str
    shape: Dims
    stacked: Dims
    """How long the axes are that only the disk has, in front of the others."""
    may_differ: bool
    """Whether it may have more or fewer rows on disk: it has one per token."""


def names_of(
    model: nn.Module, checkpoint: Checkpoint, prefixes: Sequence[SkipPrefix]
) -> Names | None:
    """Names for loading ``checkpoint`` into a model of megatron-core, as the model says them.

    None where the model is none of megatron-core, or the checkpoint has other names.

    Raises:
        PlanError: the checkpoint has more layers than the model.
    """
    if not families.is_megatron(model):
        return None
    require_world()  # what Megatron says of a model, it says of its part in the groups
    entries = list(_entries(model))
    shapes = {name: t.shape for name, t in checkpoint.tensors.items() if t.kind == "weight"}
    found = {front: sum(front + e.on_disk in shapes for e in entries) for front in FRONTS}
    front = max(FRONTS, key=lambda front: found[front])
    wanted = [e for e in entries if not any(prefix.matches(e.key) for prefix in prefixes)]
    is_complete = all(front + entry.on_disk in shapes for entry in wanted)
    if not found[front] or not (is_complete or _has_no_family(checkpoint)):
        return None
    _require_depth(wanted, shapes, front)
    disk: dict[str, Rule] = {}
    memory: dict[str, Rule] = {}
    for entry in entries:
        name = front + entry.on_disk
        rule = _rule(entry, name)
        if rule is None:
            return None
        held = shapes.get(name)
        if entry.may_differ and held is not None and _differ_in_rows(held, entry.shape):
            rows = min(held[0], entry.shape[0])
            if rows < held[0]:
                logger.warning("%s: the last %d rows are left out", name, held[0] - rows)
            rule = _rows(name, entry.key, rows, held[0])
            memory[entry.key] = _rows(entry.key, entry.key, rows, entry.shape[0])
        disk.setdefault(rule.pattern_text, rule)
    rest = rename(f"{escape(front)}**", "**") if front else rename("**", "**")
    return Names(Table([*disk.values(), rest]), Table([*memory.values(), rename("**", "**")]))


def _entries(model: nn.Module) -> Iterator[_Entry]:
    kinds = imported("megatron.core.dist_checkpointing.mapping")
    places = located(model)
    for front, stage in stages(model):
        held: Any = stage
        for live, part in held.sharded_state_dict().items():
            place = places.get(front + live)
            if place is None:
                continue  # an object, such as Transformer Engine's extra state
            piece = part
            if isinstance(part, kinds.ShardedTensorFactory):
                built = part.build()
                piece = next(iter(built.values() if isinstance(built, dict) else built))
            if isinstance(piece, kinds.ShardedTensor):
                axes = piece.prepend_axis_num
                stacked = tuple(piece.global_shape[:axes])
                free = bool(piece.allow_shape_mismatch)
                yield _Entry(place.key, piece.key, place.shape, stacked, free)


def _has_no_family(checkpoint: Checkpoint) -> bool:
    context = checkpoint.context
    return context is None or families.find(context, checkpoint.tensors) is None


def _rule(entry: _Entry, name: str) -> Rule | None:
    """The rule for all tensors like this one; None where its numbers cannot be told apart."""
    counted = numbers(entry.key)
    if not entry.stacked:
        same = numbers(entry.on_disk) == counted
        return rename(template(name), template(entry.key)) if same else None
    if len(counted) != len(entry.stacked) or numbers(entry.on_disk):
        return None
    axes = tuple(Each(0, wildcard) for wildcard in range(len(counted)))
    return Rule(escape(name), (Part(template(entry.key), axes),))


def _rows(name: str, to: str, rows: int, of: int) -> Rule:
    return Rule(escape(name), (Part(escape(to), (Narrow(0, 0, rows, of),)),), fill=True)


def _differ_in_rows(held: Dims, shape: Dims) -> bool:
    return len(held) == len(shape) and held[0] != shape[0] and held[1:] == shape[1:]


def _require_depth(wanted: Sequence[_Entry], shapes: Any, front: str) -> None:
    for entry in wanted:
        held = shapes.get(front + entry.on_disk, ())[: len(entry.stacked)]
        if any(there > here for there, here in zip(held, entry.stacked, strict=False)):
            message = (
                f"{front + entry.on_disk!r} is stored for {'x'.join(map(str, held))} layers or "
                f"experts, and the model has {'x'.join(map(str, entry.stacked))}."
            )
            cure = "Set num_layers (or num_moe_experts) to the checkpoint's value."
            problem = Problem("mismatch", entry.key, message, cure)
            raise PlanError(f"the checkpoint is deeper than the model: {problem}", (problem,))
