"""Whether pieces fill a tensor: every element once, without counting elements.

Pieces are cut apart where a plane separates them, and each part is looked at by itself. That takes
a sort per level, whatever the pieces are; only pieces that no plane separates, which no writer
makes, are compared with each other, and few of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from bioinit.layout import Dims, numel

MOST_LEVELS = 64
MOST_SORTED = 64
"""How often a span may be sorted, on average: enough for ten dims that are all cut unevenly."""

MOST_COMPARED = 64

Span = tuple[Dims, Dims]
"""Offsets and sizes."""


def fault(shape: Dims, spans: Sequence[Span]) -> str | None:
    """What is wrong with ``spans`` as parts of a tensor of ``shape``; None if they fill it.

    >>> fault((4, 2), [((0, 0), (3, 2)), ((2, 0), (2, 2))])
    'the chunks at (0, 0) of size (3, 2) and at (2, 0) of size (2, 2) overlap'
    >>> fault((4, 2), [((0, 0), (3, 2))])
    'no chunk holds 3 to 4 of dim 0 of the part at (0, 0) of size (4, 2)'
    """
    if len(spans) == 1 and spans[0] == ((0,) * len(shape), shape):
        return None
    for offsets, sizes in spans:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"the chunk at {offsets} of size {sizes} has other dims than {shape}"
        for offset, size, whole in zip(offsets, sizes, shape, strict=True):
            if offset + size > whole:
                return f"the chunk at {offsets} of size {sizes} lies outside {shape}"
    filled = [span for span in spans if 0 not in span[1]]
    if 0 in shape or _is_grid(shape, filled):
        return None
    return _fault((0,) * len(shape), shape, filled)


def _is_grid(shape: Dims, spans: Sequence[Span]) -> bool:
    """Whether all are of one size, each in another cell of its grid, and as many as cells."""
    if not spans:
        return False
    first = spans[0][1]
    if any(whole % size for whole, size in zip(shape, first, strict=True)):
        return False
    if len(spans) * numel(first) != numel(shape):
        return False
    seen = set()
    for offsets, sizes in spans:
        if sizes != first:
            return False
        for offset, size in zip(offsets, first, strict=True):
            if offset % size:
                return False
        seen.add(offsets)
    return len(seen) == len(spans)


def _fault(begin: Dims, size: Dims, spans: list[Span]) -> str | None:
    """The same for the part of the tensor at ``begin``, which all of ``spans`` lie inside."""
    waiting = [(begin, size, spans, 0)]
    room = MOST_SORTED * len(spans)
    while waiting:
        begin, size, spans, level = waiting.pop()
        if len(spans) == 1 and spans[0] == (begin, size):
            continue
        # Every dim before the one that is cut is sorted in vain; dims of 1 are passed over.
        room -= len(spans) * max(1, sum(n != 1 for n in size))
        if level > MOST_LEVELS or room < 0:
            return "its chunks are cut apart in too many steps"
        found = _cut(begin, size, spans)
        if isinstance(found, str):
            return found
        waiting.extend((*part, level + 1) for part in found)
    return None


def _cut(begin: Dims, size: Dims, spans: list[Span]) -> str | list[tuple[Dims, Dims, list[Span]]]:
    """Parts that a plane separates, or why there are none."""
    for dim, length in enumerate(size):
        if length == 1 and len(spans) > 1:
            continue
        ordered = sorted(spans, key=lambda span: span[0][dim])
        parts: list[tuple[int, int, list[Span]]] = []
        for span in ordered:
            low, high = span[0][dim], span[0][dim] + span[1][dim]
            if parts and low < parts[-1][1]:
                parts[-1][2].append(span)
                parts[-1] = (parts[-1][0], max(parts[-1][1], high), parts[-1][2])
            else:
                parts.append((low, high, [span]))
        end = begin[dim]
        for low, high, _ in parts:
            if low > end:
                return _gap(dim, end, low, begin, size)
            end = high
        if end < begin[dim] + length:
            return _gap(dim, end, begin[dim] + length, begin, size)
        if len(parts) > 1:
            return [
                (
                    (*begin[:dim], low, *begin[dim + 1 :]),
                    (*size[:dim], high - low, *size[dim + 1 :]),
                    inside,
                )
                for low, high, inside in parts
            ]
    return _inseparable(begin, size, spans)


def _inseparable(
    begin: Dims, size: Dims, spans: list[Span]
) -> str | list[tuple[Dims, Dims, list[Span]]]:
    """The same for spans that reach along every dim of the part, with no plane between them."""
    ordered = sorted(spans)[:MOST_COMPARED]
    for number, (offsets, sizes) in enumerate(ordered):
        for others, other_sizes in ordered[number + 1 :]:
            both = zip(offsets, sizes, others, other_sizes, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in both):
                return (
                    f"the chunks at {offsets} of size {sizes} and at {others} of size "
                    f"{other_sizes} overlap"
                )
    if len(spans) > MOST_COMPARED:
        return f"{len(spans)} of its chunks lie across each other"
    held = sum(numel(sizes) for _, sizes in spans)
    if held < numel(size):
        return f"no chunk holds {numel(size) - held} elements of the part at {begin} of size {size}"
    return []


def _gap(dim: int, low: int, high: int, begin: Dims, size: Dims) -> str:
    return f"no chunk holds {low} to {high} of dim {dim} of the part at {begin} of size {size}"
