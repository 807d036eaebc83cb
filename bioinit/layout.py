"""Boxes of tensors: where a region of a tensor lies in memory or in a file.

A *region* of an N-dim tensor is a box: one offset and one size per dim. A :class:`Box` adds the
strided view that holds the region: the element ``index`` of the box lies ``start + sum(index[d] *
strides[d])`` elements after a base address, which is the first byte of a stored piece or of a
parameter's local memory. A tensor, a shard of it and a stored chunk are each a list of boxes; loading
intersects two lists and copies.

Nothing here touches memory or knows a file: this is arithmetic on integers.

>>> whole = Box.contiguous((4, 6))
>>> intersect(Box((1, 0), (2, 6), 0, (6, 1)), whole)
Overlap(sizes=(12,), source_start=0, source_strides=(1,), target_start=6, target_strides=(1,))
"""

from __future__ import annotations

from typing import NamedTuple

Dims = tuple[int, ...]


class Box(NamedTuple):
    """A region (``offsets``, ``sizes``) and the strided view (``start``, ``strides``) that holds it.

    ``start`` and ``strides`` count elements; all four tuples have one entry per dim.
    """

    offsets: Dims
    sizes: Dims
    start: int
    strides: Dims

    @classmethod
    def contiguous(cls, shape: Dims) -> Box:
        """The whole of a row-major tensor of ``shape``."""
        return cls((0,) * len(shape), shape, 0, row_major(shape))


class Overlap(NamedTuple):
    """What two boxes share, as a strided view on either side. Units are elements."""

    sizes: Dims
    source_start: int
    source_strides: Dims
    target_start: int
    target_strides: Dims


def row_major(shape: Dims) -> Dims:
    """Strides, in elements, of a row-major (C order) tensor.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def numel(shape: Dims) -> int:
    """How many elements a tensor of ``shape`` has (1 for a scalar)."""
    count = 1
    for size in shape:
        count *= size
    return count


def intersect(source: Box, target: Box) -> Overlap | None:
    """What ``source`` and ``target``, boxes of the same tensor, share; None if nothing.

    Adjacent dims that lie row-major on both sides are folded into one, so two equal contiguous
    boxes give a single run. A scalar gives ``sizes == ()``.
    """
    if source == target:
        return fold(source.sizes, source.start, source.strides, target.start, target.strides)
    sizes: list[int] = []
    source_start, target_start = source.start, target.start
    for dim in range(len(source.sizes)):
        low = max(source.offsets[dim], target.offsets[dim])
        high = min(
            source.offsets[dim] + source.sizes[dim], target.offsets[dim] + target.sizes[dim]
        )
        if high <= low:
            return None
        sizes.append(high - low)
        source_start += (low - source.offsets[dim]) * source.strides[dim]
        target_start += (low - target.offsets[dim]) * target.strides[dim]
    return fold(tuple(sizes), source_start, source.strides, target_start, target.strides)


def fold(
    sizes: Dims, source_start: int, source_strides: Dims, target_start: int, target_strides: Dims
) -> Overlap:
    """An :class:`Overlap` with dims of size 1 dropped and row-major neighbours merged."""
    kept: list[tuple[int, int, int]] = []
    for size, source, target in zip(sizes, source_strides, target_strides, strict=True):
        if size == 1:
            continue
        if kept and kept[-1][1] == size * source and kept[-1][2] == size * target:
            kept[-1] = (kept[-1][0] * size, source, target)
        else:
            kept.append((size, source, target))
    return Overlap(
        tuple(k[0] for k in kept),
        source_start,
        tuple(k[1] for k in kept),
        target_start,
        tuple(k[2] for k in kept),
    )
