"""Boxes of tensors: where a region of a tensor lies in memory or in a file.

A *region* of an N-dim tensor is a box: one offset and one size per dim. A :class:`Box` adds the
strided view that holds the region: the element ``index`` of the box lies ``start + sum(index[d] *
strides[d])`` elements after a base address, which is the first byte of a stored piece or of a
parameter's local memory. A tensor, a shard of it and a stored chunk are each a list of boxes;
loading intersects two lists and copies.

Nothing here touches memory or knows a file: this is arithmetic on integers.

>>> whole = Box.contiguous((4, 6))
>>> intersect(Box((1, 0), (2, 6), 0, (6, 1)), whole)
Overlap(sizes=(12,), source_start=0, source_strides=(1,), target_start=6, target_strides=(1,))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Dims = tuple[int, ...]


class Box(NamedTuple):
    """A region (``offsets``, ``sizes``) and the view (``start``, ``strides``) that holds it.

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
        high = min(source.offsets[dim] + source.sizes[dim], target.offsets[dim] + target.sizes[dim])
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


def restrict(overlap: Overlap, low: int, high: int) -> Iterator[Overlap]:
    """The parts of ``overlap`` whose target elements lie in [``low``, ``high``).

    A target that is made piece by piece asks for a stretch of it. What lies inside whole stays one
    part; where the stretch begins or ends within a row, that row is a part of its own.

    >>> rows = Overlap((2, 3), 0, (10, 1), 0, (3, 1))
    >>> [part.sizes for part in restrict(rows, 1, 6)], [p.sizes for p in restrict(rows, 0, 6)]
    ([(2,), (3,)], [(2, 3)])
    """
    sizes, strides, start = overlap.sizes, overlap.target_strides, overlap.target_start
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if start >= high or start + span <= low or not numel(sizes):
        return
    if low <= start and start + span <= high:
        yield overlap
        return
    outer = max(range(len(sizes)), key=lambda dim: (strides[dim], sizes[dim]))
    step, count = strides[outer], sizes[outer]
    inner = span - (count - 1) * step
    first = max(0, (low - start - inner) // step + 1)
    after = min(count, -((start - high) // step))
    begin = max(0, -((start - low) // step))
    end = max(begin, min(count, (high - inner - start) // step + 1))
    for index in range(first, min(begin, after)):
        yield from restrict(_part(overlap, outer, index, 1), low, high)
    if end > begin:
        yield _part(overlap, outer, begin, end - begin)
    for index in range(max(first, end), after):
        yield from restrict(_part(overlap, outer, index, 1), low, high)


def _part(overlap: Overlap, dim: int, first: int, count: int) -> Overlap:
    """``count`` indices of dim ``dim`` from ``first`` on; a single one leaves no dim."""
    kept = slice(dim + 1, None) if count == 1 else slice(dim, None)
    sizes, source, target = overlap.sizes, overlap.source_strides, overlap.target_strides
    return Overlap(
        sizes[:dim] + ((count,) if count != 1 else ()) + sizes[dim + 1 :],
        overlap.source_start + first * source[dim],
        source[:dim] + source[kept],
        overlap.target_start + first * target[dim],
        target[:dim] + target[kept],
    )


class Block(NamedTuple):
    """A part of an overlap that is read in one go: ``span`` source elements from its start on."""

    overlap: Overlap
    span: int


GAP = 2**14
"""Elements between two stretches of a source that are skipped with a read of their own rather than
read along: one more read costs about as much as copying some tens of KiB."""


def blocks(overlap: Overlap, limit: int) -> Iterator[Block]:
    """``overlap`` cut into parts whose source span is at most ``limit`` elements.

    Rows with small gaps between them (a column shard) are read along with the gaps; wide gaps are
    not. A dim that is contiguous in the source is cut where the limit says.
    """
    sizes, strides = overlap.sizes, overlap.source_strides
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if not sizes:
        yield Block(overlap, 1)
        return
    outer = max(range(len(sizes)), key=lambda dim: (strides[dim], sizes[dim]))
    inner = span - (sizes[outer] - 1) * strides[outer]
    is_wide = strides[outer] - inner >= GAP
    if span <= limit and not is_wide:
        yield Block(overlap, span)
        return
    step = 1 if is_wide or inner > limit else max(1, (limit - inner) // max(strides[outer], 1) + 1)
    for low in range(0, sizes[outer], step):
        count = min(step, sizes[outer] - low)
        yield from blocks(_part(overlap, outer, low, count), limit)
