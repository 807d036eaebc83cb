"""Targets that no model has: the tensors that another dialect has for what a source holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from bioinit.errors import MappingError
from bioinit.families.protocol import Canonical
from bioinit.formats.protocol import StoredTensor
from bioinit.keys import template
from bioinit.layout import Box, Dims, numel
from bioinit.mapping import Mapping as Table
from bioinit.plan.facts import LoadPlan
from bioinit.targets import Target

_ALWAYS = ("needed", "zero")


class Held:
    """The canonical tensors that a source holds: how far they reach, and their dtypes.

    Args:
        stored: the source's tensors.
        table: their names and layouts.
        spell: a stored name as ``table`` has it.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        table: Table,
        spell: Callable[[str], str] = str,
    ) -> None:
        self.extents: dict[str, Dims] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.by_name: dict[str, tuple[str, ...]] = {}
        for name, tensor in stored.items():
            if tensor.kind != "weight":
                continue
            try:
                placed = table.place(spell(name), (Box.contiguous(tensor.shape),)) or []
            except MappingError:
                continue  # the plan says so
            self.by_name[name] = tuple(dict.fromkeys(key for key, _, _ in placed))
            for key, box, _ in placed:
                ends = tuple(map(int.__add__, box.offsets, box.sizes))
                before = self.extents.get(key, ends)
                same = len(before) == len(ends)
                self.extents[key] = tuple(map(max, before, ends)) if same else before
                self.dtypes.setdefault(key, tensor.dtype)

    def chosen(self, space: Mapping[str, Canonical], made: Collection[str] = ()) -> dict[str, Dims]:
        """What is to be written: what every model has, and what else is held or is ``made``."""
        chosen = {
            name: canonical.shape
            for name, canonical in space.items()
            if canonical.kind in _ALWAYS or name in self.extents or name in made
        }
        known = {template(name) for name in space}
        return chosen | {k: s for k, s in self.extents.items() if template(k) not in known}

    def kind_of(self, name: str, space: Mapping[str, Canonical]) -> str | None:
        """The one kind in ``space`` of the canonical tensors that ``name`` holds, if it is one."""
        keys = self.by_name.get(name, ())
        kinds = {space[key].kind if key in space else None for key in keys}
        return kinds.pop() if len(kinds) == 1 else None


def spelled_targets(spelled: Mapping[str, Dims], table: Table, held: Held) -> dict[str, Target]:
    """Whole targets for the tensors ``spelled`` of ``table``, in the dtypes of what is held."""
    found = {}
    dtypes: dict[str, torch.dtype] = {}
    for key, shape in spelled.items():
        kind = template(key)
        if kind not in dtypes:
            placed = table.place(key, (Box.contiguous(shape),)) or []
            known = (held.dtypes[name] for name, _, _ in placed if name in held.dtypes)
            dtypes[kind] = next(known, torch.float32)
        found[key] = whole_target(key, shape, dtypes[kind])
    return found


def whole_target(key: str, shape: Dims, dtype: torch.dtype) -> Target:
    return Target(key, shape, dtype, (Box.contiguous(shape),), False, True, None)


def common_dtype(plan: LoadPlan) -> torch.dtype | None:
    """The floating dtype that most elements of the targets will have."""
    counts: dict[torch.dtype, int] = {}
    for target in plan.targets.values():
        if target.dtype.is_floating_point:
            counts[target.dtype] = counts.get(target.dtype, 0) + numel(target.claim.shape)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None
