"""Which boxes of a tensor one process holds: arithmetic only.

A tensor that is divided over a mesh of processes is, for each of them, a list of boxes: where the
elements that it holds lie in the whole tensor, and in its own memory. A mesh axis either replicates
or takes a part along one dim. Where several axes divide one dim, each takes its part of what those
before it left, so the order in which they were applied matters, and placements do not always say
it: what they leave open is settled by the shape of the local tensor, or refused.

>>> boxes("w", (5, 4), Mesh((2,), (1,), (0, 1)), (Split(0),), (2, 4), (4, 1))
(Box(offsets=(3, 0), sizes=(2, 4), start=0, strides=(4, 1)),)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from bioinit.errors import ConfigError
from bioinit.layout import Box, Dims, numel


class Split(NamedTuple):
    """What a mesh axis does to a tensor that it divides.

    With ``groups`` 0 every rank gets one chunk of ``dim`` as ``torch.chunk`` cuts it: ceil-sized,
    the last ones short or empty. With ``groups`` n it is the ``_StridedShard`` of torch, which
    stands for either of two things: the dim is n groups, and every rank gets one chunk of each; or
    n ranks of axes further right had divided the dim before this axis did.
    """

    dim: int
    groups: int = 0

    def __str__(self) -> str:
        return f"Shard({self.dim})" if not self.groups else f"Strided({self.dim}, {self.groups})"


Placement = Split | None
"""What a mesh axis does: it divides, or (None) it replicates."""

Order = tuple[tuple[int, Split], ...]
"""Mesh axes that divide, in the order in which they were applied."""


class Mesh(NamedTuple):
    """The sizes of a mesh, where in it this process is, and the ranks it is made of, row-major."""

    sizes: Dims
    coordinate: Dims
    ranks: tuple[int, ...]


class _Run(NamedTuple):
    """Indices of one dim that follow one another."""

    start: int
    stop: int


def boxes(
    key: str,
    shape: Dims,
    mesh: Mesh,
    placements: Sequence[Placement],
    local_shape: Dims,
    strides: Dims,
    order: Order | None = None,
) -> tuple[Box, ...]:
    """The boxes of the tensor ``key`` that this process holds; none if its part is empty.

    Args:
        key: what the tensor is called, for errors.
        shape: of the whole tensor.
        mesh: over which it is divided.
        placements: one per mesh axis; dims count from 0.
        local_shape: of the tensor in local memory.
        strides: of the tensor in local memory.
        order: in which the axes were applied, where whoever divided the tensor is known.

    Raises:
        ConfigError: the local tensor is not what the placements give, or what it holds cannot be
            told from them.
    """
    possible = [order] if order is not None else [*_orders(placements, mesh.sizes)]
    fitting: dict[tuple[Box, ...], None] = {}
    for each in possible:
        held = _held(shape, each, mesh)
        sizes = _sizes(held)
        if sizes == local_shape or numel(sizes) == numel(local_shape) == 0:
            fitting[tuple(_boxes(held, strides))] = None
    if len(fitting) == 1:
        return next(iter(fitting))
    said = (
        f"{key} {list(shape)} is divided by ({', '.join(map(_text, placements))}) over a mesh of "
        f"{list(mesh.sizes)}, and its local tensor at {list(mesh.coordinate)} is "
        f"{list(local_shape)}"
    )
    if fitting:
        raise ConfigError(
            f"{said}: the placements can mean several orders of division, which give that shape "
            "with other elements. Divide it by fully_shard or by distribute_tensor over one axis "
            "for each dim, or choose sizes that the mesh divides."
        )
    wanted = " or ".join(dict.fromkeys(str([*_sizes(_held(shape, o, mesh))]) for o in possible))
    raise ConfigError(
        f"{said}, but should be {wanted}: shards follow torch.chunk, ceil-sized from the "
        "first rank on. Let distribute_tensor, fully_shard or parallelize_module divide it."
    )


def replicas(mesh: Mesh, placements: Sequence[Placement]) -> tuple[int, ...]:
    """The ranks that hold the same boxes as this one, which is among them; empty if no other."""
    indices = [
        range(size) if placement is None else (at,)
        for size, at, placement in zip(mesh.sizes, mesh.coordinate, placements, strict=True)
    ]
    found = []
    for coordinate in itertools.product(*indices):
        position = 0
        for size, at in zip(mesh.sizes, coordinate, strict=True):
            position = position * size + at
        found.append(mesh.ranks[position])
    return tuple(sorted(found)) if len(found) > 1 else ()


def after_others(placements: Sequence[Placement], sizes: Dims) -> Order:
    """The order of ``fully_shard``: it divides what tensor parallelism left of a tensor.

    It says so by a ``_StridedShard`` whose groups count the ranks of axes to the right.
    """
    found: list[tuple[int, Split]] = []
    for axis in reversed(range(len(placements))):
        split = placements[axis]
        if split is None:
            continue
        at = _behind(split, found, sizes)
        found.insert(at, (axis, Split(split.dim) if at else split))
    return tuple(found)


def _behind(split: Split, others: Sequence[tuple[int, Split]], sizes: Dims) -> int:
    """Behind how many of ``others`` this one comes if its groups are their ranks; else 0."""
    ranks = 1
    for number, (axis, other) in enumerate(others, start=1):
        if other.dim == split.dim:
            ranks *= sizes[axis]
            if split.groups > 1 and ranks == split.groups:
                return number
    return 0


def _orders(placements: Sequence[Placement], sizes: Dims) -> Iterator[Order]:
    """What ``placements`` can mean: ``fully_shard``'s order, and torch's from left to right."""
    last = after_others(placements, sizes)
    yield last
    first = tuple((axis, split) for axis, split in enumerate(placements) if split is not None)
    if first != last:
        yield first


def _held(shape: Dims, order: Order, mesh: Mesh) -> tuple[tuple[_Run, ...], ...]:
    """What this process holds of each dim, as it follows one another in memory."""
    held: list[tuple[_Run, ...]] = [(_Run(0, size),) if size else () for size in shape]
    for axis, split in order:
        index, count = mesh.coordinate[axis], mesh.sizes[axis]
        groups = [held[split.dim]]
        if split.groups > 1:
            groups = [_chunk(groups[0], split.groups, group) for group in range(split.groups)]
        held[split.dim] = _joined(run for group in groups for run in _chunk(group, count, index))
    return tuple(held)


def _chunk(held: Sequence[_Run], count: int, index: int) -> tuple[_Run, ...]:
    """Chunk ``index`` of ``count`` of what is ``held``."""
    size = -(-sum(stop - start for start, stop in held) // count)
    low, high = index * size, (index + 1) * size
    found = []
    at = 0
    for start, stop in held:
        first, after = max(low, at), min(high, at + stop - start)
        if first < after:
            found.append(_Run(start + first - at, start + after - at))
        at += stop - start
    return tuple(found)


def _joined(held: Iterable[_Run]) -> tuple[_Run, ...]:
    found: list[_Run] = []
    for run in held:
        if found and found[-1].stop == run.start:
            run = _Run(found.pop().start, run.stop)
        found.append(run)
    return tuple(found)


def _sizes(held: Sequence[Sequence[_Run]]) -> Dims:
    return tuple(sum(stop - start for start, stop in runs) for runs in held)


def _boxes(held: Sequence[Sequence[_Run]], strides: Dims) -> Iterator[Box]:
    """Every combination of runs, with where it starts in local memory."""
    placed: list[list[tuple[int, int, int]]] = []
    for runs, stride in zip(held, strides, strict=True):
        at = 0
        placed.append([])
        for start, stop in runs:
            placed[-1].append((start, stop - start, at * stride))
            at += stop - start
    for combination in itertools.product(*placed):
        offsets = tuple(start for start, _, _ in combination)
        sizes = tuple(size for _, size, _ in combination)
        yield Box(offsets, sizes, sum(start for _, _, start in combination), strides)


def _text(placement: Placement) -> str:
    return "Replicate()" if placement is None else str(placement)
