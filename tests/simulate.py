"""Carry out a naming without the real loader: boxes copied with torch, one by one.

The tests of families compare what the tables say with what the original library loads. This is the
smallest possible reader of the tables, so that a mistake in one is not hidden by the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from bioinit.layout import Box, intersect
from bioinit.mapping import Names


def whole(tensor: torch.Tensor) -> tuple[Box, ...]:
    return (Box.contiguous(tuple(tensor.shape)),)


def execute(
    names: Names, stored: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What ``names`` make of ``stored`` for tensors like ``live``; NaN where nothing lands."""
    sources: dict[str, list[tuple[Box, torch.Tensor]]] = defaultdict(list)
    for key, tensor in stored.items():
        for placed in names.disk.place(key, whole(tensor)) or ():
            sources[placed.key].append((placed.box, tensor.contiguous().flatten()))
    made: dict[str, torch.Tensor] = {}
    for key, like in live.items():
        empty = float("nan") if like.is_floating_point() else -1
        target = torch.full(tuple(like.shape), empty, dtype=like.dtype)
        flat = target.view(-1) if target.dim() else target.view(1)
        for placed in names.memory.place(key, whole(target)) or ():
            for box, tensor in sources[placed.key]:
                overlap = intersect(box, placed.box)
                if overlap is None:
                    continue
                at = torch.as_strided(
                    flat, overlap.sizes, overlap.target_strides, overlap.target_start
                )
                at.copy_(
                    torch.as_strided(
                        tensor, overlap.sizes, overlap.source_strides, overlap.source_start
                    )
                )
        made[key] = target
    for conversion in names.conversions:
        made |= conversion.convert([stored[key] for key in conversion.sources])
    return made
