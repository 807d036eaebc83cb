"""Which names a transform takes and makes, call by call.

A pattern's first wildcards are those of its partners, by position; what they caught must be the
same on all sides. ``**`` may catch another way to the same place (``decoder.layers.3`` and
``block.3``): there the numbers are compared, if they tell the names apart. A further wildcard is
*spread*: what it caught goes to, or comes from, one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bioinit.errors import MappingError
from bioinit.keys import Pattern, natural, numbers, suggestion
from bioinit.transforms.pairing import Captures, in_order, listed

_CURE = (
    "Names are paired by what the wildcards catch, never by their order. Write the same wildcards "
    "on all sides, give odd names a line of their own, narrow the pattern, or take out of the "
    "source's state dict what the target lacks."
)
_REGEX = frozenset("[](){}|+?^$")


class TransformError(MappingError, ValueError):
    """A line of a mapping, or its function, does not fit the names or tensors."""


class UnpairedNames(TransformError, IndexError):
    """A name on one side of a transform has no partner on the other."""


class Call(NamedTuple):
    """The names behind each source pattern and each target pattern."""

    sources: tuple[tuple[str, ...], ...]
    targets: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Side:
    """A pattern, what it is (source or target), and the names it catches."""

    word: str
    pattern: Pattern
    caught: Mapping[Captures, str]

    @classmethod
    def of(cls, word: str, text: str, names: Iterable[str]) -> _Side:
        pattern = Pattern(text)
        found = ((pattern.match(name), name) for name in names)
        return cls(word, pattern, {caught: name for caught, name in found if caught is not None})

    @property
    def count(self) -> int:
        """How many wildcards it has."""
        return len(self.pattern.wildcards)

    @cached_property
    def words(self) -> list[str]:
        """The word before each wildcard."""
        texts = self.pattern.spell(("\0",) * self.count).split("\0")[:-1]
        return [text.rstrip(".").rpartition(".")[2] for text in texts]

    def column(self, place: int) -> set[str]:
        """What the wildcard at ``place`` caught."""
        return {caught[place] for caught in self.caught}

    @property
    def text(self) -> str:
        names = list(self.caught.values())
        return f"{self.word} {self.pattern.text!r} catches {len(names)} ({_few(names)})"


def pair(
    line: str,
    sources: Sequence[str],
    targets: Sequence[str],
    source_names: Iterable[str],
    target_names: Iterable[str],
) -> list[Call]:
    """The calls that the names give reason for; none if no pattern catches anything.

    Raises:
        TransformError: a pattern catches nothing, or the wildcards cannot be paired.
        UnpairedNames: what the wildcards caught differs from side to side.
    """
    names = {"source": list(source_names), "target": list(target_names)}
    sides = [_Side.of("source", text, names["source"]) for text in sources]
    sides += [_Side.of("target", text, names["target"]) for text in targets]
    if not any(side.caught for side in sides) and all(side.count for side in sides):
        return []
    for side in sides:
        if not side.caught:
            raise _nothing(line, side, sides, names[side.word])
    shared = min(max(side.count, 1) for side in sides)
    for side in sides:
        _check_shape(line, side, sides, shared)
    by_key = [_by_key(side, views) for side, views in _views(sides, shared)]
    _check_same(line, sides, by_key)
    keys = next((list(found) for found in by_key if found is not None), [()])
    _check_literals(line, sides, len(keys))
    calls = []
    for key in sorted(keys, key=in_order):
        given = [
            tuple(side.caught.values()) if found is None else _ordered(line, side, found[key])
            for side, found in zip(sides, by_key, strict=True)
        ]
        calls.append(Call(tuple(given[: len(sources)]), tuple(given[len(sources) :])))
    for side, found in zip(sides, by_key, strict=True):
        if found is not None and side.count > shared:
            _check_grid(line, side, shared)
    return calls


def spreads(text: str, others: Sequence[str]) -> bool:
    """Whether the pattern ``text`` has a wildcard more than those it is paired with."""
    counts = [max(len(Pattern(each).wildcards), 1) for each in (text, *others)]
    return counts[0] > min(counts)


def _nothing(line: str, side: _Side, sides: Sequence[_Side], names: list[str]) -> TransformError:
    cure = suggestion(side.pattern.text, names)
    others = "; ".join(other.text for other in sides if other.caught)
    hint = (
        " In a pattern only * and ** mean more than themselves; regular expressions do not."
        if _REGEX & set(side.pattern.text)
        else ""
    )
    return (UnpairedNames if side.count else TransformError)(
        f"No matches found for {side.word} key: {side.pattern.text} (in {line}) among "
        f"{len(names)} names{f', while {others}' if others else ''}.{f' {cure}' if cure else ''}"
        f"{hint} Correct the pattern, or leave the line out for this model."
    )


def _check_shape(line: str, side: _Side, sides: Sequence[_Side], shared: int) -> None:
    """Wildcards that cannot be told apart, or that stand for something else on the other side."""
    if side.count > shared + 1:
        raise TransformError(
            f"{line}: {side.word} {side.pattern.text!r} has {side.count} wildcards where its "
            f"partners have {shared}. One wildcard more is spread over one call, not "
            f"{side.count - shared}. Spell one of them out."
        )
    model = next(each for each in sides if max(each.count, 1) == shared)
    mine, theirs = side.words, model.words
    for here, word in enumerate(mine):
        for there, other in enumerate(theirs):
            is_crossed = (
                word
                and word == other
                and theirs[here : here + 1] != [word]
                and mine[there : there + 1] != [word]
            )
            if is_crossed:
                raise TransformError(
                    f"{line}: the wildcard after {word!r} is number {here + 1} in "
                    f"{side.pattern.text!r} and number {there + 1} in {model.pattern.text!r}. "
                    "Wildcards are paired by position: write them in the same order, or spell one "
                    "of them out."
                )


def _views(sides: Sequence[_Side], shared: int) -> Iterable[tuple[_Side, tuple[bool, ...] | None]]:
    """Each side, and for each of its shared wildcards whether only its numbers count."""
    wild = [side for side in sides if side.count]
    by_number = []
    for place in range(shared if wild else 0):
        columns = [side.column(place) for side in wild]
        is_same = all(column == columns[0] for column in columns)
        is_deep = any(side.pattern.wildcards[place] == "**" for side in wild)
        by_number.append(not is_same and is_deep and _is_numbered(columns))
    for side in sides:
        yield side, tuple(by_number) if side.count else None


def _is_numbered(columns: Sequence[set[str]]) -> bool:
    """Whether numbers alone tell names apart, in one order however they are sorted."""
    orders = []
    for column in columns:
        plain = all(text.isdecimal() for text in column)
        order = [numbers(text) for text in (sorted(column, key=int) if plain else sorted(column))]
        if len(set(order)) < len(order):
            return False
        orders.append(order)
    return all(order == orders[0] for order in orders)


def _by_key(
    side: _Side, by_number: tuple[bool, ...] | None
) -> dict[Captures, list[Captures]] | None:
    """What it caught, by what tells calls apart; None if it has no wildcard."""
    if by_number is None:
        return None
    found: dict[Captures, list[Captures]] = {}
    for caught in side.caught:
        key = tuple(
            ".".join(numbers(text)) if is_number else text
            for text, is_number in zip(caught, by_number, strict=False)
        )
        found.setdefault(key, []).append(caught)
    return found


def _check_same(
    line: str, sides: Sequence[_Side], by_key: Sequence[dict[Captures, list[Captures]] | None]
) -> None:
    """Every name of every side must have a partner on all others."""
    tables = [found for found in by_key if found is not None]
    shared = {key for found in tables for key in found if all(key in other for other in tables)}
    alone = []
    for side, found in zip(sides, by_key, strict=True):
        names = [
            side.caught[caught]
            for key, all_caught in (found or {}).items()
            if key not in shared
            for caught in all_caught
        ]
        if names:
            alone.append(f"{_few(sorted(names, key=natural))} ({side.word} {side.pattern.text!r})")
    if alone:
        raise UnpairedNames(
            f"Mismatch between source and target keys ({line}): without a partner are "
            f"{' and '.join(alone)}. {_CURE}"
        )


def _check_literals(line: str, sides: Sequence[_Side], count: int) -> None:
    literal = next((side for side in sides if not side.count), None)
    if literal is not None and count > 1:
        wild = next(side for side in sides if side.count)
        raise UnpairedNames(
            f"Mismatch between source and target keys ({line}): {wild.text}, and the "
            f"{literal.word} {literal.pattern.text!r} is one name. {_CURE}"
        )


def _ordered(line: str, side: _Side, captures: Sequence[Captures]) -> tuple[str, ...]:
    """The names of one call, in the order of what the last wildcard caught."""
    ordered = sorted(captures, key=in_order)
    if any("." in text for caught in captures[1:] for text in caught[-1:]):
        if ordered != sorted(captures):
            raise TransformError(
                f"{line}: {side.word} {side.pattern.text!r} spreads names whose order is not plain "
                f"({_few([side.caught[each] for each in ordered])}). Use * for the part that is "
                "spread."
            )
    return tuple(side.caught[each] for each in ordered)


def _check_grid(line: str, side: _Side, shared: int) -> None:
    """What is spread must be the same in every call."""
    spread = {caught[shared] for caught in side.caught}
    shares = {caught[:shared] for caught in side.caught}
    holes = [
        side.pattern.spell((*share, each))
        for share in sorted(shares, key=in_order)
        for each in sorted(spread, key=natural)
        if (*share, each) not in side.caught
    ]
    if holes:
        raise UnpairedNames(
            f"{line}: {listed(holes)} missing, which {side.word} {side.pattern.text!r} has "
            "elsewhere. Every call must get the same; add what is missing, or narrow the pattern."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if names[3:] else "")
