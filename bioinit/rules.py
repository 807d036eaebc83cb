"""The rule kinds: how a tensor of one dialect lies in the canonical space of its family.

A rule turns a named tensor into placements: pairs of a canonical key and a box. The box speaks of
the canonical tensor's dims and of the memory that the dialect's tensor already has, so a fused QKV
is three placements of views and no copy. Because a placement is a pair, the same list serves
reading and writing: a rule needs no second table for the way back.

Operations act on lists of boxes, so a shard is placed as well as a whole tensor: an interval of a
dim that is unflattened into k factors becomes at most 2k - 1 boxes. Each operation also knows its
way back for shapes (``before``), so a table says which tensors a dialect has for a model.

Three verbs are no views. *Drop*: what a rule narrows away, or a rule without parts. *Fill*: what no
part reaches of a target is zero, where the rule says so (padded vocabularies). *Affine*:
``Part.add``, for norms that one dialect stores as ``1 + weight``.

>>> from bioinit.layout import Box
>>> fused = Rule("qkv", (Part("q", (Narrow(0, 0, 2),)), Part("k", (Narrow(0, 2, 2),))))
>>> whole = (Box.contiguous((4, 3)),)
>>> [(part.to, box.sizes, box.start) for part in fused.parts for _, box in part.views(whole)]
[('q', (2, 3), 0), ('k', (2, 3), 6)]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
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

    def before(self, shape: Dims, count: int) -> Dims:
        """The shape that becomes ``shape``; ``count`` is how many indices :class:`Each` has."""


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

    def before(self, shape: Dims, count: int) -> Dims:
        return (*shape[: self.dim], numel(self.sizes), *shape[self.dim + len(self.sizes) :])


@dataclass(frozen=True, slots=True)
class Permute:
    """Reorder dims: dim ``i`` of the result is dim ``dims[i]``."""

    dims: Dims

    def apply(self, box: Box) -> Iterator[Indexed]:
        if sorted(self.dims) != list(range(len(box.sizes))):
            raise MappingError(
                f"the order of dims {self.dims} does not name each of the {len(box.sizes)} dims of "
                "the tensor once. Name every dim, counted from 0."
            )
        yield (
            None,
            Box(
                tuple(box.offsets[d] for d in self.dims),
                tuple(box.sizes[d] for d in self.dims),
                box.start,
                tuple(box.strides[d] for d in self.dims),
            ),
        )

    def before(self, shape: Dims, count: int) -> Dims:
        return tuple(size for _, size in sorted(zip(self.dims, shape, strict=True)))


@dataclass(frozen=True, slots=True)
class Narrow:
    """Keep ``length`` indices of dim ``dim`` from ``start`` on; they count from 0 afterwards.

    ``of`` is how many there were, where the other parts of the rule do not say it.
    """

    dim: int
    start: int
    length: int
    of: int | None = None

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

    def before(self, shape: Dims, count: int) -> Dims:
        size = self.start + self.length if self.of is None else self.of
        return (*shape[: self.dim], size, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Reinterpret:
    """Read the row-major elements of a tensor of shape ``was`` as one of shape ``now``."""

    was: Dims
    now: Dims

    def apply(self, box: Box) -> Iterator[Indexed]:
        if len(box.sizes) != len(self.was) or numel(self.was) != numel(self.now):
            raise MappingError(
                f"a box of {box.sizes} cannot be read as part of {self.was} and then as {self.now}."
                " The config and the stored shape disagree."
            )
        ends = tuple(map(int.__add__, box.offsets, box.sizes))
        if any(end > size for end, size in zip(ends, self.was, strict=True)):
            raise MappingError(
                f"a tensor that reaches {ends} is larger than {self.was}, as which it is to be "
                f"read. The config and the stored shape disagree."
            )
        whole = row_major(self.was)
        inner = row_major(self.now)
        depth = _dense_from(box, self.was)  # from this dim on, the box is one run
        stride = box.strides[-1] if box.strides else 1
        run = numel(box.sizes[depth:])
        for index in itertools.product(*map(range, box.sizes[:depth])):
            start = box.start + sum(map(int.__mul__, index, box.strides))
            at = (*map(int.__add__, box.offsets, index), *box.offsets[depth:])
            low = sum(map(int.__mul__, at, whole))
            for offsets, sizes in _interval(low, low + run, self.now):
                first = sum(map(int.__mul__, offsets, inner))
                strides = tuple(size * stride for size in inner)
                yield None, Box(offsets, sizes, start + (first - low) * stride, strides)

    def before(self, shape: Dims, count: int) -> Dims:
        return self.was


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

    def before(self, shape: Dims, count: int) -> Dims:
        return (*shape[: self.dim], count, *shape[self.dim :])


@dataclass(frozen=True)
class Part:
    """One canonical tensor, or one per index of an :class:`Each`, inside a dialect's tensor.

    The canonical value is the dialect's plus ``add``.
    """

    to: str
    ops: tuple[Operation, ...] = ()
    add: float = 0.0

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
            try:
                found = [
                    (drawn if index is None else (*drawn, index), after)
                    for drawn, box in found
                    for index, after in op.apply(box)
                ]
            except IndexError:
                dims = min(len(box.sizes) for _, box in found)
                raise MappingError(
                    f"{op} names a dim that a tensor of {dims} dims does not have."
                ) from None
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

    def divide(self, found: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The inverse of :meth:`key`: what its wildcards caught, as captures and drawn indices."""
        drawn = tuple(found[wildcard] for wildcard in self.each)
        return tuple(f for i, f in enumerate(found) if i not in self.each), drawn

    def before(self, shape: Dims, counts: tuple[int, ...]) -> Dims:
        """The dialect's shape for a canonical one, with so many indices for each ``Each``."""
        left = list(counts)
        for op in reversed(self.ops):
            shape = op.before(shape, left.pop() if isinstance(op, Each) else 0)
        return shape


@dataclass(frozen=True)
class Rule:
    """One line of a mapping: a pattern of dialect keys and the parts that lie inside.

    ``text`` is what a report prints for it. A rule without parts says that a tensor is known and
    not needed; ``note`` says why. With ``fill``, what no part reaches of a tensor is zero. With
    ``zero``, all of it is for a checkpoint of a world that has no such tensor.
    ``is_loss`` says that a tensor without parts was trained: whoever converts would lose it.
    ``shift`` is added to the number that the first wildcard of the key catches, where a dialect
    counts its layers from another number on.

    Raises:
        MappingError: a part has more or fewer wildcards than the key and its ``Each`` provide.
    """

    pattern_text: str
    parts: tuple[Part, ...]
    note: str = ""
    fill: bool = False
    zero: bool = False
    shift: int = 0
    is_loss: bool = False

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

    def match(self, key: str) -> tuple[str, ...] | None:
        """What the wildcards of ``key`` stand for in canonical names; None if it is another's."""
        found = self.pattern.match(key)
        return _shifted(found, self.shift) if found and self.shift else found

    def spell(self, captures: tuple[str, ...]) -> str:
        """The dialect's key for what canonical names have in the place of its wildcards."""
        back = _shifted(captures, -self.shift) if self.shift else captures
        return self.pattern.spell(captures if back is None else back)

    @cached_property
    def is_rename(self) -> bool:
        return len(self.parts) == 1 and not self.parts[0].ops and not self.parts[0].add

    @cached_property
    def text(self) -> str:
        if self.note:
            return self.note
        if self.is_rename and self.parts[0].to == self.pattern_text:
            return "copy"
        names = ", ".join(dict.fromkeys(part.to for part in self.parts))
        verb = "rename" if self.is_rename else "view"
        return f"{verb} {self.pattern_text} <-> {names}{self.added}"

    @property
    def added(self) -> str:
        """What canonical values are more than this dialect's, for a report; mostly nothing."""
        found = dict.fromkeys(part.add for part in self.parts if part.add)
        return "".join(f" (canonical = {self.pattern_text} {add:+g})" for add in found)


def rename(key: str, to: str, note: str = "") -> Rule:
    """A rule that changes the name and nothing else."""
    return Rule(key, (Part(to),), note)


def dropped(key: str, why: str, *, is_loss: bool = False) -> Rule:
    """A rule for a tensor that is known and not needed."""
    return Rule(key, (), why, is_loss=is_loss)


def stacked(rule: Rule, wildcard: int = 0) -> Rule:
    """``rule`` for a tensor that has one more dim in front, instead of wildcard ``wildcard``.

    >>> stacked(rename("layers.*.norm.weight", "h.*.norm.weight")).pattern_text
    'layers.norm.weight'
    """
    segments = rule.pattern_text.split(".")
    stars = [number for number, segment in enumerate(segments) if "*" in segment]
    del segments[stars[wildcard]]
    parts = (
        replace(part, ops=(Each(0, _wildcard_of(part, wildcard)), *part.ops)) for part in rule.parts
    )
    return replace(rule, pattern_text=".".join(segments), parts=tuple(parts))


def _shifted(captures: tuple[str, ...], by: int) -> tuple[str, ...] | None:
    if not captures[0].isdecimal() or int(captures[0]) + by < 0:
        return None
    return str(int(captures[0]) + by), *captures[1:]


def _wildcard_of(part: Part, capture: int) -> int:
    """Which wildcard of the canonical name capture number ``capture`` of the key fills."""
    free = [w for w in range(len(part.pattern.wildcards)) if w not in part.each]
    return free[capture]


def _dense_from(box: Box, was: Dims) -> int:
    """The first dim from which on ``box`` is one evenly spaced run of a tensor of shape ``was``."""
    depth = max(len(was) - 1, 0)
    while depth and box.sizes[depth] == was[depth]:
        if box.strides[depth - 1] != box.strides[depth] * was[depth]:
            break
        depth -= 1
    return depth


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
