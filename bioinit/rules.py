"""The rule kinds: how a tensor of one dialect lies in the canonical space of its family.

A rule turns a named tensor into placements: pairs of a canonical key and a box. The box speaks of
the canonical tensor's dims and of the memory that the dialect's tensor already has, so a fused QKV
is three placements of views and no copy. Because a placement is a pair, the same list serves
reading and writing: a rule needs no second table for the way back.

Operations act on lists of boxes, so a shard is placed as well as a whole tensor: an interval of a
dim that is unflattened into k factors becomes at most 2k - 1 boxes.

>>> from bioinit.layout import Box
>>> fused = Rule("qkv", (Part("q", (Narrow(0, 0, 2),)), Part("k", (Narrow(0, 2, 2),))))
>>> whole = (Box.contiguous((4, 3)),)
>>> [(part.to, box.sizes, box.start) for part in fused.parts for _, box in part.views(whole)]
[('q', (2, 3), 0), ('k', (2, 3), 6)]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from bioinit.errors import MappingError
from bioinit.keys import Pattern
from bioinit.layout import Box, Dims, numel, row_major

Indexed = tuple[int | None, Box]
"""A box and, after :class:`Each`, the index that the canonical key gets."""


class Operation(Protocol):
    """One step from the dialect's dims towards the canonical ones, on one box."""

    def apply(self, box: Box) -> Iterator[Indexed]:
        """The boxes that ``box`` becomes; none where it has nothing in common with the result."""


@dataclass(frozen=True, slots=True)
class Unflatten:
    """Split dim ``dim`` into factors of ``sizes``, outermost first."""

    dim: int
    sizes: Dims

    def apply(self, box: Box) -> Iterator[Indexed]:
        d = self.dim
        low, size, stride = box.offsets[d], box.sizes[d], box.strides[d]
        if low + size > numel(self.sizes):
            raise MappingError(
                f"a dim that reaches {low + size} cannot be unflattened into {self.sizes} "
                f"= {numel(self.sizes)}. The config and the stored shape disagree."
            )
        inner = row_major(self.sizes)
        for offsets, sizes in _interval(low, low + size, self.sizes):
            first = sum(o * i for o, i in zip(offsets, inner, strict=True))
            yield (
                None,
                Box(
                    box.offsets[:d] + offsets + box.offsets[d + 1 :],
                    box.sizes[:d] + sizes + box.sizes[d + 1 :],
                    box.start + (first - low) * stride,
                    box.strides[:d] + tuple(i * stride for i in inner) + box.strides[d + 1 :],
                ),
            )


@dataclass(frozen=True, slots=True)
class Permute:
    """Reorder dims: dim ``i`` of the result is dim ``dims[i]``."""

    dims: Dims

    def apply(self, box: Box) -> Iterator[Indexed]:
        yield (
            None,
            Box(
                tuple(box.offsets[d] for d in self.dims),
                tuple(box.sizes[d] for d in self.dims),
                box.start,
                tuple(box.strides[d] for d in self.dims),
            ),
        )


@dataclass(frozen=True, slots=True)
class Narrow:
    """Keep ``length`` indices of dim ``dim`` from ``start`` on; they count from 0 afterwards."""

    dim: int
    start: int
    length: int

    def apply(self, box: Box) -> Iterator[Indexed]:
        d = self.dim
        low = max(box.offsets[d], self.start)
        high = min(box.offsets[d] + box.sizes[d], self.start + self.length)
        if high > low:
            yield (
                None,
                Box(
                    (*box.offsets[:d], low - self.start, *box.offsets[d + 1 :]),
                    (*box.sizes[:d], high - low, *box.sizes[d + 1 :]),
                    box.start + (low - box.offsets[d]) * box.strides[d],
                    box.strides,
                ),
            )


@dataclass(frozen=True, slots=True)
class Each:
    """Give every index of dim ``dim`` a canonical key of its own; the dim disappears.

    The index becomes wildcard number ``wildcard`` of the canonical pattern. ``first`` is the index
    that position 0 stands for.
    """

    dim: int
    wildcard: int
    first: int = 0

    def apply(self, box: Box) -> Iterator[Indexed]:
        d = self.dim
        for index in range(box.offsets[d], box.offsets[d] + box.sizes[d]):
            yield (
                index + self.first,
                Box(
                    box.offsets[:d] + box.offsets[d + 1 :],
                    box.sizes[:d] + box.sizes[d + 1 :],
                    box.start + (index - box.offsets[d]) * box.strides[d],
                    box.strides[:d] + box.strides[d + 1 :],
                ),
            )


@dataclass(frozen=True)
class Part:
    """One canonical tensor, or one per index of an :class:`Each`, inside a dialect's tensor."""

    to: str
    ops: tuple[Operation, ...] = ()

    @cached_property
    def pattern(self) -> Pattern:
        return Pattern(self.to)

    @cached_property
    def each(self) -> tuple[int, ...]:
        """The wildcards of ``to`` that come from an index, not from the dialect's key."""
        return tuple(op.wildcard for op in self.ops if isinstance(op, Each))

    def views(self, boxes: tuple[Box, ...]) -> list[tuple[tuple[int, ...], Box]]:
        """Every box after all operations, with the indices that :class:`Each` drew out."""
        found: list[tuple[tuple[int, ...], Box]] = [((), box) for box in boxes]
        for op in self.ops:
            found = [
                (drawn if index is None else (*drawn, index), after)
                for drawn, box in found
                for index, after in op.apply(box)
            ]
        return found

    def key(self, captures: tuple[str, ...], drawn: tuple[int, ...]) -> str:
        """The canonical key: ``captures`` fill the wildcards that ``drawn`` indices leave."""
        if not drawn:
            return self.pattern.spell(captures)
        fill: list[str | None] = [None] * len(self.pattern.wildcards)
        for wildcard, index in zip(self.each, drawn, strict=True):
            fill[wildcard] = str(index)
        rest = iter(captures)
        return self.pattern.spell(tuple(next(rest) if f is None else f for f in fill))


@dataclass(frozen=True)
class Rule:
    """One line of a mapping: a pattern of dialect keys and the parts that lie inside.

    ``text`` is what a report prints for it.

    Raises:
        MappingError: a part has more or fewer wildcards than the key and its ``Each`` provide.
    """

    pattern_text: str
    parts: tuple[Part, ...]
    note: str = ""

    def __post_init__(self) -> None:
        have = len(self.pattern.wildcards)
        for part in self.parts:
            want = len(part.pattern.wildcards)
            if want != have + len(part.each) or any(w >= want for w in part.each):
                raise MappingError(
                    f"rule {self.pattern_text!r} -> {part.to!r}: the key has {have} wildcards and "
                    f"the operations draw out {len(part.each)}, but the canonical name has {want}. "
                    "Each wildcard of the canonical name needs exactly one source."
                )

    @cached_property
    def pattern(self) -> Pattern:
        return Pattern(self.pattern_text)

    @cached_property
    def is_rename(self) -> bool:
        return len(self.parts) == 1 and not self.parts[0].ops

    @cached_property
    def text(self) -> str:
        if self.note:
            return self.note
        if self.is_rename and self.parts[0].to == self.pattern_text:
            return "copy"
        names = ", ".join(dict.fromkeys(part.to for part in self.parts))
        verb = "rename" if self.is_rename else "view"
        return f"{verb} {self.pattern_text} <-> {names}"


def rename(key: str, to: str, note: str = "") -> Rule:
    """A rule that changes the name and nothing else."""
    return Rule(key, (Part(to),), note)


def _interval(low: int, high: int, factors: Dims) -> Iterator[tuple[Dims, Dims]]:
    """Boxes (offsets, sizes) of ``factors`` that cover the flat interval [low, high) in order."""
    if len(factors) == 1:
        if high > low:
            yield (low,), (high - low,)
        return
    inner = numel(factors[1:])
    first, last = -(-low // inner), high // inner
    if first > last:  # the interval lies inside one outer index
        for offsets, sizes in _interval(low % inner, high - (low // inner) * inner, factors[1:]):
            yield (low // inner, *offsets), (1, *sizes)
        return
    if low % inner:
        for offsets, sizes in _interval(low % inner, inner, factors[1:]):
            yield (low // inner, *offsets), (1, *sizes)
    if last > first:
        yield (first,) + (0,) * (len(factors) - 1), (last - first, *factors[1:])
    if high % inner:
        for offsets, sizes in _interval(0, high % inner, factors[1:]):
            yield (last, *offsets), (1, *sizes)
