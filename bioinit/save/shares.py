"""Which rank holds which box of a divided model, and in which memory.

Every rank says what it has; put together, the model is a set of stored tensors whose pieces lie in
"files" of several ranks, each the memory of one parameter. What several ranks hold alike is taken
from one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from bioinit.errors import ConfigError
from bioinit.formats.protocol import Piece, StoredTensor
from bioinit.layout import Box, Dims, numel
from bioinit.ranks import World
from bioinit.targets import Located, Target, describe, local, slots


class Place(NamedTuple):
    """The memory of one tensor: the ``number``-th that ``rank`` told of, of ``size`` bytes."""

    rank: int
    number: int
    size: int
    key: str


@dataclass(frozen=True)
class Shares:
    """A live model as stored tensors.

    ``places`` are their files; ``mine`` the slots of this process, by the numbers in their places.
    """

    stored: Mapping[str, StoredTensor]
    places: tuple[Place, ...]
    mine: tuple[str, ...]


def shares_of(
    model: nn.Module,
    located: Mapping[str, Located],
    world: World,
    *,
    spread: bool = False,
) -> Shares:
    """What all ranks hold together, the same on each of them.

    Args:
        model: the part of this process.
        located: as :func:`bioinit.targets.describe` takes it.
        world: all who call this.
        spread: take what several ranks hold from each of them in turn, by bytes, and not from the
            first that has it.

    Raises:
        ConfigError: two ranks say different things of one tensor, or what they hold of it is not
            each of its elements once.
    """
    own = [t for t in describe(model, located).values() if _is_told(t, world.rank)]
    told = world.gathered([_said(target, _reach(target)) for target in own])
    merged = _merged([[_Said(*entry) for entry in entries] for entries in told], spread)
    return Shares(*merged, tuple(target.slot for target in own))


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The local memory of ``tensor``, from its first element to its last, as bytes."""
    held = local(tensor).detach()
    steps = zip(held.shape, held.stride(), strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in steps) if held.numel() else 0
    return torch.as_strided(held, (reach,), (1,)).view(torch.uint8)


def memories(model: nn.Module, names: tuple[str, ...]) -> list[torch.Tensor]:
    """The memory behind each of these names of ``model``, as bytes."""
    live = {slot.key: slot.tensor for slot in slots(model)}
    return [flat(live[name]) for name in names]


class _Said(NamedTuple):
    """What one rank tells of a tensor, as plain data."""

    key: str
    shape: list[int]
    dtype: str
    size: int
    boxes: list[list[Any]]


def _is_told(target: Target, rank: int) -> bool:
    if not target.persistent or target.tied_to is not None:
        return False
    return bool(target.boxes) and (not target.replicas or rank in target.replicas)


def _reach(target: Target) -> int:
    """Bytes from the first local element to the last."""
    ends = [
        1
        + box.start
        + sum((size - 1) * step for size, step in zip(box.sizes, box.strides, strict=True))
        for box in target.boxes
        if numel(box.sizes)
    ]
    return max(ends, default=0) * target.dtype.itemsize


def _said(target: Target, size: int) -> _Said:
    boxes = [[list(b.offsets), list(b.sizes), b.start, list(b.strides)] for b in target.boxes]
    dtype = str(target.dtype).removeprefix("torch.")
    return _Said(target.key, list(target.shape), dtype, size, boxes)


def _merged(
    told: list[list[_Said]], spread: bool
) -> tuple[dict[str, StoredTensor], tuple[Place, ...]]:
    """The tensors, in the order in which ranks name them, and the files of their pieces."""
    holders: dict[str, dict[tuple[Dims, Dims], list[tuple[int, int, Box]]]] = {}
    kinds: dict[str, tuple[Dims, torch.dtype]] = {}
    for rank, entries in enumerate(told):
        for number, said in enumerate(entries):
            kind = (tuple(said.shape), getattr(torch, said.dtype))
            if kinds.setdefault(said.key, kind) != kind:
                raise ConfigError(
                    f"rank {rank} holds {said.key!r} as {list(kind[0])} {said.dtype}, and another "
                    f"rank as {list(kinds[said.key][0])} {kinds[said.key][1]}. Build the model "
                    "alike on all ranks."
                )
            boxes = holders.setdefault(said.key, {})
            for offsets, sizes, start, strides in said.boxes:
                box = Box(tuple(offsets), tuple(sizes), start, tuple(strides))
                boxes.setdefault(box[:2], []).append((rank, number, box))
    taken = [0] * len(told)
    places: dict[tuple[int, int], int] = {}
    pieces: dict[str, list[Piece]] = {key: [] for key in holders}
    for key, boxes in holders.items():
        _require_once(key, kinds[key][0], [sizes for _, sizes in boxes])
        for (_, sizes), held in boxes.items():
            rank, number, box = min(held, key=lambda one: taken[one[0]]) if spread else held[0]
            taken[rank] += numel(sizes) * kinds[key][1].itemsize
            file = places.setdefault((rank, number), len(places))
            pieces[key].append(Piece(file, 0, box))
    stored = {key: StoredTensor(*kinds[key], tuple(found)) for key, found in pieces.items()}
    return stored, tuple(
        Place(rank, number, told[rank][number].size, told[rank][number].key)
        for rank, number in places
    )


def _require_once(key: str, shape: Dims, boxes: Sequence[Dims]) -> None:
    """Refuse boxes, none of them twice, that hold more or fewer elements than there are."""
    held = sum(map(numel, boxes))
    if held != numel(shape):
        raise ConfigError(
            f"the ranks hold {len(boxes)} different regions of {key!r} {list(shape)} with {held} "
            f"elements together, and it has {numel(shape)}. Divide the model so that two regions "
            "are the same or have nothing in common, and that together they are the whole."
        )
