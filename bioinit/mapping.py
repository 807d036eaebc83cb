"""An ordered table of rules: a dialect's names and layouts to the canonical ones of its family.

The first rule whose pattern matches a key places it. A key that no rule knows is None, never a
guess. Rules are found by the key's template (its numeric segments as wildcards) in one dictionary
look-up; only patterns whose wildcards stand for other than numbers are tried one by one.
"""

from __future__ import annotations

import collections.abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from bioinit.errors import MappingError
from bioinit.keys import Pattern, loosened, numbers, template
from bioinit.layout import Box, Dims
from bioinit.rules import Part, Rule, rename

_FAILURES = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError)
"""What operations of torch and of a library raise for a tensor that they cannot work on."""


Shapes = collections.abc.Mapping[str, Dims]
"""Shapes of tensors by key."""


class Placed(NamedTuple):
    """One box of a canonical tensor, as a view of the memory of the dialect's tensor."""

    key: str
    box: Box
    add: float = 0.0


class Converting(Protocol):
    """A line of a mapping that is a function and no view; the room ``transforms`` holds them."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Patterns of the dialect's keys that it takes."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Patterns of the canonical keys that it makes."""


class Mapping:
    """Rules of one dialect, in order. ``Mapping.identity()`` leaves every key as it is.

    Transforms may stand among the rules; they take their keys before any rule does.
    """

    def __init__(self, rules: Sequence[Rule | Converting]) -> None:
        self.rules = tuple(line for line in rules if isinstance(line, Rule))
        self.transforms = tuple(line for line in rules if not isinstance(line, Rule))
        # Patterns that name a number tell keys of one template apart, so those are not remembered.
        self._numbered = [
            Pattern(loosened(r.pattern_text)) for r in self.rules if numbers(r.pattern_text)
        ]
        self._by_template: dict[str, Rule | None] = {}
        first = self.rules[0] if self.rules else None
        self._everything = first if first is not None and _is_identity(first) else None
        self._views: dict[tuple[int, tuple[Box, ...]], list[tuple[int, tuple[int, ...], Box]]] = {}

    @classmethod
    def identity(cls) -> Mapping:
        return cls((rename("**", "**"),))

    def rule_for(self, key: str) -> Rule | None:
        """The first rule that knows ``key``."""
        if self._everything is not None:
            return self._everything
        kind = template(key)
        if kind in self._by_template:
            return self._by_template[kind]
        first = next((rule for rule in self.rules if rule.pattern.match(key) is not None), None)
        if not any(pattern.match(key) for pattern in self._numbered):
            self._by_template[kind] = first
        return first

    def place(self, key: str, boxes: tuple[Box, ...]) -> list[Placed] | None:
        """Where ``boxes`` of the tensor ``key`` lie in the canonical space; None if unknown.

        Raises:
            MappingError: a rule needs other dims than the tensor has.
        """
        if self._everything is not None:
            return [Placed(key, box) for box in boxes]
        rule = self.rule_for(key)
        if rule is None:
            return None
        captures = rule.match(key)
        if captures is None:
            return None
        if rule.is_rename:
            name = rule.parts[0].pattern.spell(captures)
            return [Placed(name, box) for box in boxes]
        known = self._views.get((id(rule), boxes))
        if known is None:
            known = [
                (number, drawn, box)
                for number, part in enumerate(rule.parts)
                for drawn, box in part.views(boxes)
            ]
            self._views[id(rule), boxes] = known
        parts = rule.parts
        return [
            Placed(parts[number].key(captures, drawn), box, parts[number].add)
            for number, drawn, box in known
        ]

    def spelled_out(self, canonical: Shapes) -> dict[str, Dims]:
        """Keys and shapes of this dialect's tensors for canonical ones: the inverse of the table.

        Of several rules for one canonical tensor the first counts; the others are read and not
        written. Canonical tensors that no rule knows are left out.

        Raises:
            MappingError: the parts of one tensor do not give one shape.
        """
        writers: dict[str, tuple[Rule, Part] | None] = {}
        held: dict[str, dict[Part, list[tuple[tuple[int, ...], Dims]]]] = {}
        for name, shape in canonical.items():
            kind = template(name)
            if kind not in writers:
                writers[kind] = self._writer(name)
            found = writers[kind]
            if found is None:
                continue
            rule, part = found
            captures, drawn = part.divide(part.pattern.match(name) or ())
            key = rule.spell(captures)
            held.setdefault(key, {}).setdefault(part, []).append((tuple(map(int, drawn)), shape))
        return {key: _shape_before(key, parts) for key, parts in held.items()}

    def spells(self, canonical: str) -> bool:
        """Whether this dialect has a word for the canonical tensor."""
        return self._writer(canonical) is not None

    def _writer(self, name: str) -> tuple[Rule, Part] | None:
        for rule in self.rules:
            for part in rule.parts:
                if part.pattern.match(name) is not None:
                    return rule, part
        return None


@dataclass(frozen=True)
class Conversion:
    """A conversion that is not a move of elements: ``run`` makes all ``targets`` from ``sources``.

    ``targets`` are keys of the live model, ``sources`` are stored names in the order that ``run``
    takes them; ``text`` names the operation for the plan and the receipt.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    run: Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]
    text: str

    def convert(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What ``run`` makes of ``inputs``, by target; a target it does not make is absent.

        Raises:
            MappingError: the operation does not work on such tensors.
        """
        try:
            made = self.run(inputs)
        except _FAILURES as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs[:4])
            more = f" and {len(inputs) - 4} more" if inputs[4:] else ""
            raise MappingError(
                f"{self.text} cannot be carried out on tensors of {shapes}{more}: "
                f"{type(error).__name__}: {error}. Correct the config field that sizes them."
            ) from error
        has_values = not any(tensor.is_meta for tensor in inputs)
        for key, tensor in made.items():
            if tensor.layout != torch.strided or (tensor.is_meta and has_values):
                what = "no values" if tensor.is_meta else f"the layout {tensor.layout}"
                raise MappingError(
                    f"{self.text} made a tensor for {key!r} that has {what}. Return an ordinary "
                    "tensor (.to_dense(), not on meta)."
                )
        return made

    def foresee(self, like: Sequence[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """``convert`` on meta, for shapes and dtypes; None if the operation reads values.

        Raises:
            MappingError: the operation does not work on such tensors.
        """
        try:
            return self.convert([tensor.to("meta") for tensor in like])
        except MappingError as error:
            # What torch raises where an operation has no meta kernel, since it needs the numbers.
            reads_values = isinstance(error.__cause__, NotImplementedError)
            if reads_values or "meta tensor" in str(error.__cause__).lower():
                return None
            raise


class Names(NamedTuple):
    """Both sides of a load: stored names and live names, each to the canonical space."""

    disk: Mapping
    memory: Mapping
    conversions: tuple[Conversion, ...] = ()

    def with_sources(self, stored_as: dict[str, str]) -> Names:
        """With conversions that read stored names, given the stored name of each spelled one."""
        read = (
            replace(c, sources=tuple(stored_as[name] for name in c.sources))
            for c in self.conversions
        )
        return self._replace(conversions=tuple(read))


def _shape_before(key: str, parts: dict[Part, list[tuple[tuple[int, ...], Dims]]]) -> Dims:
    """The shape of the tensor ``key`` of which ``parts`` are parts."""
    shapes: list[Dims] = []
    for part, found in parts.items():
        counts = tuple(len(set(each)) for each in zip(*(drawn for drawn, _ in found), strict=True))
        if math.prod(counts) != len(found) or len({shape for _, shape in found}) > 1:
            raise MappingError(
                f"{key!r} should hold {part.to!r} once for each of {counts}, of one shape, but "
                f"{len(found)} are there: layers or experts are missing, or differ in shape."
            )
        shapes.append(part.before(found[0][1], counts))
    if len({len(shape) for shape in shapes}) > 1:
        raise MappingError(f"the parts of {key!r} give it different dims: {shapes}.")
    return tuple(map(max, zip(*shapes, strict=True)))


def _is_identity(rule: Rule) -> bool:
    return rule.is_rename and rule.pattern_text == "**" == rule.parts[0].to
