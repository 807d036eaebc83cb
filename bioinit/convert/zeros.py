"""Stored tensors that may be left behind because they are zero: the other world means zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bioinit.contexts import Checkpoint
from bioinit.errors import Problem
from bioinit.layout import numel
from bioinit.report import raise_for

_AT_ONCE = 2**22


def require_zeros(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Look at the values of ``names``, a few rows at a time.

    Raises:
        PlanError: one of them holds something else.
    """
    raise_for([_problem(name) for name in names if not _is_zero(checkpoint, name)], "there is")


def _is_zero(checkpoint: Checkpoint, name: str) -> bool:
    shape = checkpoint.tensors[name].shape
    if not shape:
        return not bool(torch.count_nonzero(checkpoint.read(name)))
    step = max(1, _AT_ONCE // max(1, numel(shape[1:])))
    for first in range(0, shape[0], step):
        offsets = (first, *(0 for _ in shape[1:]))
        sizes = (min(step, shape[0] - first), *shape[1:])
        if torch.count_nonzero(checkpoint.read(name, (offsets, sizes))):
            return False
    return True


def _problem(name: str) -> Problem:
    return Problem(
        "unused",
        name,
        f"{name!r} is not zero, and the other world has no such tensor: there it would be.",
        f"Convert to a dialect that has it, or leave it behind with --drop {name}.",
    )
