"""The transforms of a mapping for one checkpoint and one model, each tensor claimed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from bioinit.errors import MappingError
from bioinit.keys import suggestion
from bioinit.layout import Box, Dims, intersect
from bioinit.mapping import Conversion, Names
from bioinit.mapping import Mapping as Table
from bioinit.rules import Rule
from bioinit.transforms import Call, Transform
from bioinit.transforms.pairing import Given, Keys, flat

Shapes = Mapping[str, Dims]


def expanded(
    names: Names,
    stored: Shapes,
    owners: Mapping[str, str | None],
    spell: Callable[[str], str] = str,
) -> Names:
    """``names`` with a conversion for every call of the transforms of its disk side.

    A transform takes its sources before any rule sees them.

    Args:
        names: both sides of a load.
        stored: the stored tensors.
        owners: the keys of the live model; for a tied one, the key that owns the memory.
        spell: a stored name as the disk side spells it.

    Raises:
        MappingError: patterns catch nothing or too little, a source is caught by two transforms, or
            a target is claimed twice.
    """
    if not names.disk.transforms:
        return names
    live: dict[str, str] = {}
    for key, owner in owners.items():
        rule = names.memory.rule_for(key)
        if rule is not None and rule.is_rename:
            live[rule.parts[0].key(rule.match(key) or (), ())] = owner or key
    stored_as = {spell(name): name for name in stored}
    shapes = {spelled: stored[name] for spelled, name in stored_as.items()}
    made = Names(names.disk, names.memory, conversions(names.disk, shapes, live))
    found = made.with_sources(stored_as).conversions
    return names._replace(conversions=(*names.conversions, *found))


def across(
    names: Names, stored: Shapes, canonical: Shapes, spell: Callable[[str], str] = str
) -> tuple[Names, dict[str, Dims]]:
    """A conversion's tables with the transforms of both, and every tensor that is to be written.

    Args:
        names: the table that is read, and as memory the one that is written.
        stored: the stored tensors.
        canonical: the canonical tensors that are to be written.
        spell: a stored name as the table that is read spells it.

    Returns:
        The tables with their conversions, and the keys and shapes of what is written.

    Raises:
        MappingError: see :func:`expanded` and :func:`way_back`; or what an inverse takes is no
            tensor of its own in the source.
    """
    shapes, back = way_back(names.memory, canonical)
    taken = {name for conversion in back for name in conversion.sources}
    left = {name: shape for name, shape in canonical.items() if name not in taken}
    written = names.memory.spelled_out(left)
    names = expanded(names, stored, dict.fromkeys(written), spell)
    if not back:
        return names, written
    whole: dict[str, str] = {}
    for name in stored:
        rule = names.disk.rule_for(spell(name))
        if rule is not None and rule.is_rename:
            whole[rule.parts[0].key(rule.match(spell(name)) or (), ())] = name
    for name in sorted(taken.difference(whole)):
        raise MappingError(
            f"{name!r} is needed whole for the dialect that is to be written, and in the source it "
            "is no tensor of its own. Convert to a dialect in which it is one, and from there."
        )
    through = Names(names.disk, names.memory, back).with_sources(whole)
    return (
        names._replace(conversions=(*names.conversions, *through.conversions)),
        written | shapes,
    )


def promised(table: Table, stored: Iterable[str], canonical: Shapes) -> set[str]:
    """Which canonical tensors the transforms of ``table`` make of these stored names."""
    keys, names = Keys(canonical), tuple(stored)
    return {
        key
        for transform in transforms_of(table)
        for call in transform.calls(names)
        for given in transform.targets_of(call, keys) or ()
        for key in flat(given)
    }


def conversions(table: Table, stored: Shapes, live: Mapping[str, str]) -> tuple[Conversion, ...]:
    """The transforms of ``table``, one conversion per call whose targets are keys of ``live``.

    ``live`` says for each canonical tensor which key of the model it fills.

    Raises:
        MappingError: see :func:`expanded`.
    """
    found: list[Conversion] = []
    caught: dict[str, Transform] = {}
    claimed: dict[str, Transform] = {}
    keys = Keys(live)
    for transform in transforms_of(table):
        calls = transform.calls(stored)
        made = [(call, transform.targets_of(call, keys)) for call in calls]
        if not any(targets for _, targets in made):
            first = transform.sides[1][0].spell(calls[0].captures)
            cure = suggestion(first, live)
            raise MappingError(
                f"{transform.text} ({transform.arrow}): the model has none of what it makes, "
                f"{first!r} for one.{f' {cure}' if cure else ''} Correct the target, or leave the "
                "transform out."
            )
        for call, targets in made:
            for name in call.names:
                if caught.setdefault(name, transform) is not transform:
                    raise _twice(name, caught[name], transform, "is caught")
            for key in (key for given in targets or () for key in flat(given)):
                if claimed.setdefault(live[key], transform) is not transform:
                    raise _twice(key, claimed[live[key]], transform, "is claimed")
            if targets is not None:
                owned = tuple(_owned(given, live) for given in targets)
                found.append(_conversion(transform, call, owned))
    makers = {key: claimed[owner] for key, owner in live.items() if owner in claimed}
    taken = {name for conversion in found for name in conversion.sources}
    for name, rule, key, _ in _places(table, stored, taken):
        if key in makers:
            raise MappingError(
                f"{key!r} is claimed twice: {makers[key].text} makes it, and the rule "
                f"{rule.text!r} leads {name!r} there. Narrow one of them, or drop the tensor."
            )
    return tuple(found)


def catches(table: Table, name: str) -> bool:
    """Whether a transform of ``table`` takes stored tensors of this name."""
    return any(
        side.pattern.match(name) is not None
        for transform in transforms_of(table)
        for side in transform.sides[0]
    )


def transforms_of(table: Table) -> tuple[Transform, ...]:
    """The transforms among the lines of ``table``.

    Raises:
        MappingError: a line is neither a rule nor a transform.
    """
    found: list[Transform] = []
    for line in table.transforms:
        if not isinstance(line, Transform):
            raise MappingError(
                f"a line of the mapping is {line!r:.100}, which is neither a rule nor a transform. "
                "Write rename(...) or a Rule, or put @bioinit.transform(...) over the function."
            )
        found.append(line)
    return tuple(found)


def require_single_claims(names: Names, stored: Shapes) -> None:
    """Refuse a table in which two rules lead two stored tensors to the same place.

    Raises:
        MappingError: they do; the message names both.
    """
    taken = {name for conversion in names.conversions for name in conversion.sources}
    seen: dict[str, list[tuple[str, Rule, Box]]] = {}
    for name, rule, key, box in _places(names.disk, stored, taken):
        others = seen.setdefault(key, [])
        for other, by, filled in others:
            if by is not rule and intersect(filled, box) is not None:
                raise MappingError(
                    f"{key!r} is claimed twice: by {other!r} ({by.text}) and by {name!r} "
                    f"({rule.text}). Narrow one of the rules, or drop one of the tensors."
                )
        others.append((name, rule, box))


def way_back(table: Table, canonical: Shapes) -> tuple[dict[str, Dims], tuple[Conversion, ...]]:
    """What the transforms of ``table`` write for canonical tensors: shapes by name, and how.

    A wildcard that only the sources have is counted from 0, as many times as the inverse says.
    Transforms whose targets ``canonical`` lacks are left out.

    Raises:
        MappingError: a transform has no inverse, or its inverse only works on numbers.
    """
    shapes: dict[str, Dims] = {}
    found: list[Conversion] = []
    for forward in transforms_of(table):
        if not any(side.pattern.match(n) for side in forward.sides[1] for n in canonical):
            continue
        back = forward.inverted()
        for call in back.calls(canonical):
            like = [torch.empty(canonical[name], device="meta") for name in call.names]
            try:
                made = back.made(call, like)
            except NotImplementedError as error:
                raise MappingError(
                    f"the inverse of {forward.text} reads values, so nobody can say beforehand "
                    f"what it makes: {error}. Write it with operations of torch alone."
                ) from error
            targets = tuple(
                tuple(side.spell(call.captures, (str(i),)) for i in range(len(value)))
                if side.gathers and isinstance(value, Sequence)
                else side.spell(call.captures)
                for side, value in zip(back.sides[1], made, strict=True)
            )
            shapes |= {k: tuple(t.shape) for k, t in back.named(call, targets, like).items()}
            found.append(_conversion(back, call, targets))
    return shapes, tuple(found)


def _conversion(transform: Transform, call: Call, targets: tuple[Given, ...]) -> Conversion:
    keys = tuple(key for given in targets for key in flat(given))
    return Conversion(keys, call.names, partial(transform.named, call, targets), transform.text)


def _owned(given: Given, live: Mapping[str, str]) -> Given:
    return live[given] if isinstance(given, str) else tuple(live[key] for key in given)


def _places(
    table: Table, stored: Shapes, taken: Collection[str]
) -> Iterator[tuple[str, Rule, str, Box]]:
    """Where rules lead every stored tensor that is not ``taken``: name, rule, key and box."""
    for name, shape in stored.items():
        rule = None if name in taken else table.rule_for(name)
        if rule is None:
            continue
        try:
            placed = table.place(name, (Box.contiguous(shape),)) or []
        except MappingError:
            continue  # the plan says which rule does not fit which tensor
        for each in placed:
            yield name, rule, each.key, each.box


def _twice(name: str, first: Transform, second: Transform, what: str) -> MappingError:
    return MappingError(
        f"{name!r} {what} twice: by {first.text} ({first.arrow}) and by {second.text} "
        f"({second.arrow}). Narrow one of them, or make them one transform with several targets."
    )
