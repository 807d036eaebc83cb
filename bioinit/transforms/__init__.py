"""Functions in a mapping, for what no view expresses: one call per layer, per expert, per tensor.

A *transform* takes the stored tensors that its source patterns catch and makes what its target
patterns name. Patterns are paired by what their wildcards caught, by value: layer 5 meets layer 5,
whatever else there is. A wildcard that the sources have and the targets lack is *gathered*: all
that it caught goes to one call as a tuple, in numeric order. One that only targets have is handed
out again, from a sequence. A source without wildcards is given to every call.

What a function takes is checked when it is declared; who is paired with whom, when names are known
and before a byte is read.

>>> @transform(sources=("layers.*.q", "layers.*.k"), target="layers.*.qk")
... def fuse(q, k):
...     return torch.cat([q, k])
>>> [call.sources for call in fuse.calls(["layers.5.k", "layers.5.q", "norm"])]
[('layers.5.q', 'layers.5.k')]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from bioinit.errors import MappingError
from bioinit.keys import natural, suggestion
from bioinit.transforms.pairing import (
    Captures,
    Given,
    Keys,
    Side,
    flat,
    in_order,
    listed,
    sides,
)

__all__ = ["Call", "Transform", "transform"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """One call: what the shared wildcards caught, and the names behind each argument."""

    captures: Captures
    sources: tuple[Given, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every stored name that it takes, in the order of the arguments."""
        return tuple(name for given in self.sources for name in flat(given))


@dataclass(frozen=True)
class Transform:
    """A function with the patterns of what it takes and makes; called, it is the function.

    Raises:
        MappingError: the function cannot take that many sources, or the patterns cannot be paired.
    """

    function: Function
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    inverse: Function | None = None

    def __post_init__(self) -> None:
        for word, patterns in (("sources", self.sources), ("target", self.targets)):
            if not patterns or len(set(patterns)) < len(patterns):
                wrong = "names a pattern twice" if patterns else "names nothing"
                raise MappingError(
                    f"{self.text}: {word}={patterns!r} {wrong}. Name each tensor once."
                )
        self._check_arity("", self.function, self.sources)
        if self.inverse is not None:
            self._check_arity("the inverse of ", self.inverse, self.targets)
        self.sides  # noqa: B018  patterns that cannot be paired are an error now

    def _check_arity(self, which: str, function: Function, given: Sequence[str]) -> None:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            raise MappingError(
                f"{which}{self.text} does not say what it takes. Write a function with def that "
                "calls it."
            ) from None
        try:
            signature.bind(*given)
        except TypeError as error:
            raise MappingError(
                f"{which}{self.text} takes {signature}, but gets {len(given)} "
                f"tensor{'s' if given[1:] else ''}, from {', '.join(map(repr, given))}: {error}. "
                "Give it one positional parameter for each pattern, or *rest."
            ) from None

    def __call__(self, *tensors: Any) -> Any:
        return self.function(*tensors)

    @property
    def text(self) -> str:
        """What a report prints for it."""
        return f"transform {getattr(self.function, '__name__', type(self.function).__name__)}"

    @cached_property
    def sides(self) -> tuple[tuple[Side, ...], tuple[Side, ...]]:
        """Its patterns as they are paired: sources and targets."""
        return sides(self.text, self.sources, self.targets)

    def inverted(self) -> Transform:
        """The way back: what makes the sources from the targets.

        Raises:
            MappingError: no inverse was given.
        """
        if self.inverse is None:
            raise MappingError(
                f"{self.text} ({self.arrow}) has no way back, so its names cannot be written. "
                "Give it inverse=, a function that makes the sources from the targets."
            )
        return Transform(self.inverse, self.targets, self.sources, self.function)

    @property
    def arrow(self) -> str:
        return f"{', '.join(self.sources)} -> {', '.join(self.targets)}"

    def calls(self, names: Iterable[str]) -> list[Call]:
        """The calls that ``names`` give reason for, one per value of the shared wildcards.

        Raises:
            MappingError: a pattern catches nothing, one source of a call is missing, or what is
                gathered has gaps.
        """
        stored = tuple(names)
        tables: list[dict[Captures, Given]] = []
        for side in self.sides[0]:
            table = side.table(stored, self.text)
            if not table:
                cure = suggestion(side.pattern.text, stored)
                raise MappingError(
                    f"{self.text}: the pattern {side.pattern.text!r} catches none of the "
                    f"{len(stored)} names.{f' {cure}' if cure else ''} Correct it, or leave the "
                    "transform out for these names."
                )
            tables.append(table)
        own = [table for side, table in zip(self.sides[0], tables, strict=True) if side.kept]
        found = {captures for table in own for captures in table} or {()}
        lacking: list[str] = []
        calls: list[Call] = []
        for captures in sorted(found, key=in_order):
            given: list[Given] = []
            for side, table in zip(self.sides[0], tables, strict=True):
                name = table.get(captures if side.kept else ())
                if name is None:
                    lacking.append(side.spell(captures))
                else:
                    given.append(name)
            call = Call(captures, tuple(given))
            if len(set(call.names)) < len(call.names):
                raise MappingError(
                    f"{self.text} ({self.arrow}) catches a tensor twice{_where(call)}: "
                    f"{', '.join(map(repr, call.names[:4]))}. Narrow its patterns."
                )
            calls.append(call)
        if lacking:
            raise MappingError(
                f"{self.text} ({self.arrow}): {listed(lacking)} missing, and other sources of the "
                "same call are there. Store what is missing, or narrow the patterns."
            )
        for call in calls:
            self._check_gathered(call)
        return calls

    def _check_gathered(self, call: Call) -> None:
        """Sources that gather a wildcard after the same word must gather the same."""
        seen: dict[tuple[str, ...], set[Captures]] = {}
        for side, given in zip(self.sides[0], call.sources, strict=True):
            if side.gathers:
                caught = {side.gathered(name) for name in flat(given)}
                differ = seen.setdefault(side.gathered_words, caught) ^ caught
                if differ:
                    names = sorted((".".join(each) for each in differ), key=natural)
                    raise MappingError(
                        f"{self.text} ({self.arrow}): {listed(names)} gathered from one source and "
                        f"not from another{_where(call)}. Store what is missing, or narrow the "
                        "patterns."
                    )

    def targets_of(self, call: Call, keys: Keys) -> tuple[Given, ...] | None:
        """The keys that ``call`` fills; None if the model has none of them.

        Raises:
            MappingError: the model has some of them and not the rest.
        """
        found = [keys.of(side, call.captures) for side in self.sides[1]]
        for side, given in zip(self.sides[1], found, strict=True):
            if given is None and any(found):
                name = side.spell(call.captures)
                cure = suggestion(name, keys.names)
                raise MappingError(
                    f"{self.text} makes {name!r} too, which the model does not have."
                    f"{f' {cure}' if cure else ''} Correct the target, or make fewer."
                )
        return tuple(given for given in found if given is not None) or None

    def made(self, call: Call, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """What the function gives for each target, from the tensors that ``call`` names.

        Raises:
            MappingError: the function failed, or gives another number of things.
            NotImplementedError: it was tried on meta, and needs the numbers.
        """
        left = iter(inputs)
        arguments = [
            next(left) if isinstance(given, str) else tuple(next(left) for _ in given)
            for given in call.sources
        ]
        try:
            result = self.function(*arguments)
        except Exception as error:  # whatever the code of somebody else raises
            if any(tensor.is_meta for tensor in inputs) and "meta" in str(error):
                raise NotImplementedError(str(error)) from error
            shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs[:4])
            raise MappingError(
                f"{self.text} failed{_where(call)} on tensors of {shapes}"
                f"{', ...' if inputs[4:] else ''}: {type(error).__name__}: {error}. Correct the "
                "function, or what it is given."
            ) from error
        if len(self.targets) == 1:
            return (result,)
        return self._several(result, self.targets)

    def named(
        self, call: Call, targets: Sequence[Given], inputs: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """:meth:`made`, by the name of each target."""
        found: dict[str, torch.Tensor] = {}
        for given, value in zip(targets, self.made(call, inputs), strict=True):
            values = (value,) if isinstance(given, str) else self._several(value, given)
            for name, tensor in zip(flat(given), values, strict=True):
                if not isinstance(tensor, torch.Tensor):
                    raise MappingError(
                        f"{self.text} gives a {type(tensor).__name__} for {name!r}. Return a "
                        "tensor."
                    )
                found[name] = tensor
        return found

    def _several(self, result: Any, wanted: Sequence[str]) -> tuple[Any, ...]:
        if not isinstance(result, Sequence) or len(result) != len(wanted):
            count = len(result) if isinstance(result, Sequence) else f"a {type(result).__name__}"
            raise MappingError(
                f"{self.text} gives {count} where {len(wanted)} tensors are wanted "
                f"({', '.join(map(repr, wanted[:3]))}{', ...' if wanted[3:] else ''}). Return a "
                "tuple with one for each, in this order."
            )
        return tuple(result)


def transform(
    *,
    sources: str | tuple[str, ...],
    target: str | tuple[str, ...],
    inverse: Function | None = None,
) -> Callable[[Function], Transform]:
    """Declare a function as a line of a :class:`bioinit.Mapping`.

    It may be called more than once, the first time with tensors that have a shape and no values.

    Args:
        sources: patterns of stored names, one per positional argument; ``*rest`` takes the rest.
        target: the pattern of what the function returns; of several, it returns one each.
        inverse: takes the targets and returns the sources; ``convert`` uses it to write.

    Raises:
        MappingError: the function does not take that many, or the patterns cannot be paired.
    """
    taken = (sources,) if isinstance(sources, str) else tuple(sources)
    made = (target,) if isinstance(target, str) else tuple(target)
    return lambda function: Transform(function, taken, made, inverse)


def _where(call: Call) -> str:
    return f" at {', '.join(call.captures)}" if call.captures else ""
