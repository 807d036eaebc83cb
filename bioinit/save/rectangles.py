"""Copies into a tensor as boxes of it: what a rank that writes its own share stores.

A copy of a plan is a strided view of a row-major tensor. Mostly it is a box of it, rows or columns;
where heads of several kinds are interleaved it is a few of them, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bioinit.layout import Dims, Overlap, numel, row_major


class Rectangle(NamedTuple):
    """A region of a tensor, and where its elements come from, as if it were a tensor itself."""

    offsets: Dims
    sizes: Dims
    overlap: Overlap


class _Factor(NamedTuple):
    size: int
    target: int
    source: int


def rectangles(shape: Dims, overlap: Overlap) -> Iterator[Rectangle]:
    """``overlap``, whose target is a row-major tensor of ``shape``, as boxes of that.

    >>> [r[:2] for r in rectangles((4, 6), Overlap((2, 3), 0, (3, 1), 8, (6, 1)))]
    [((1, 2), (2, 3))]
    >>> [r[:2] for r in rectangles((4, 6), Overlap((2, 6), 0, (6, 1), 0, (12, 1)))]
    [((0, 0), (1, 6)), ((2, 0), (1, 6))]
    """
    factors = sorted(
        map(_Factor, overlap.sizes, overlap.target_strides, overlap.source_strides),
        key=lambda factor: -factor.target,
    )
    offsets = _unravelled(shape, overlap.target_start)
    sizes = _sizes(shape, offsets, factors)
    if sizes is not None:
        dims = tuple(factor.size for factor in factors)
        steps = tuple(factor.source for factor in factors)
        yield Rectangle(
            offsets, sizes, Overlap(dims, overlap.source_start, steps, 0, row_major(dims))
        )
        return
    outer, *inner = factors
    for index in range(outer.size):
        part = Overlap(
            tuple(factor.size for factor in inner),
            overlap.source_start + index * outer.source,
            tuple(factor.source for factor in inner),
            overlap.target_start + index * outer.target,
            tuple(factor.target for factor in inner),
        )
        yield from rectangles(shape, part)


def missing(shape: Dims, held: Iterable[tuple[Dims, Dims]]) -> list[tuple[Dims, Dims]]:
    """What of a tensor of ``shape`` is in none of the boxes ``held``, as boxes.

    >>> missing((4, 6), [((0, 0), (3, 6))])
    [((3, 0), (1, 6))]
    """
    left = [((0,) * len(shape), shape)] if numel(shape) else []
    for offsets, sizes in held:
        left = [part for box in left for part in _without(*box, offsets, sizes)]
    return left


def _unravelled(shape: Dims, position: int) -> Dims:
    found = []
    for step in row_major(shape):
        found.append(position // step if step else 0)
        position -= found[-1] * step
    return tuple(found)


def _sizes(shape: Dims, offsets: Dims, factors: list[_Factor]) -> Dims | None:
    """The sizes of the box that ``factors`` are, from its first element on; None if they are none.

    ``factors`` descend. One may span several dims: neighbours were folded into one.
    """
    left = [(factor.size, factor.target) for factor in factors]
    sizes = [1] * len(shape)
    for dim in reversed(range(len(shape))):
        step = row_major(shape)[dim]
        while left and left[-1][1] == step * sizes[dim] and sizes[dim] < shape[dim]:
            size, target = left.pop()
            room, rest = divmod(shape[dim], sizes[dim])
            if size <= room:
                sizes[dim] *= size
            elif rest or size % room:
                return None
            else:
                sizes[dim] = shape[dim]
                left.append((size // room, target * room))
        if offsets[dim] + sizes[dim] > shape[dim]:
            return None
    return None if left else tuple(sizes)


def _without(offsets: Dims, sizes: Dims, low: Dims, count: Dims) -> Iterator[tuple[Dims, Dims]]:
    """The box ``offsets``, ``sizes`` less another one, as boxes that do not overlap."""
    ends = tuple(map(int.__add__, offsets, sizes))
    begin = tuple(map(max, offsets, low))
    end = tuple(map(min, ends, map(int.__add__, low, count)))
    if any(last <= first for first, last in zip(begin, end, strict=True)):
        yield offsets, sizes
        return
    inner_low, inner_high = list(offsets), list(ends)
    for dim in range(len(offsets)):
        for first, last in ((inner_low[dim], begin[dim]), (end[dim], inner_high[dim])):
            if last > first:
                lows, highs = list(inner_low), list(inner_high)
                lows[dim], highs[dim] = first, last
                yield tuple(lows), tuple(map(int.__sub__, highs, lows))
        inner_low[dim], inner_high[dim] = begin[dim], end[dim]
