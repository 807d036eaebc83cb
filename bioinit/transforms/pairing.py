"""Which name belongs to which call: patterns paired by what their wildcards caught.

The wildcards that all patterns of a transform share tell its calls apart; their values are
compared, never their order in the checkpoint. What a pattern has beyond them is gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from bioinit.errors import MappingError
from bioinit.keys import Pattern, natural

Given = str | tuple[str, ...]
"""What one argument is made of: a name, or those that a wildcard gathered."""

Captures = tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """A pattern, and which of its wildcards tell calls apart; the others are gathered."""

    pattern: Pattern
    kept: tuple[int, ...]

    @property
    def gathers(self) -> bool:
        return len(self.kept) < len(self.pattern.wildcards)

    @cached_property
    def gathered_words(self) -> tuple[str, ...]:
        """The words before the wildcards that are gathered."""
        words = _words(self.pattern)
        return tuple(word for i, word in enumerate(words) if i not in self.kept)

    def gathered(self, name: str) -> Captures:
        """What the gathered wildcards caught of ``name``."""
        caught = self.pattern.match(name) or ()
        return tuple(each for i, each in enumerate(caught) if i not in self.kept)

    def spell(self, captures: Captures, gathered: Captures = ()) -> str:
        """The name for these captures; what is gathered stays a star if it is not given."""
        kept, rest = dict(zip(self.kept, captures, strict=False)), iter(gathered)
        count = len(self.pattern.wildcards)
        full = tuple(kept[i] if i in kept else next(rest, "*") for i in range(count))
        return self.pattern.spell(full)

    def table(self, names: Iterable[str], who: str) -> dict[Captures, Given]:
        """The names that the pattern catches, by what the kept wildcards caught.

        Raises:
            MappingError: gathered numbers leave one out.
        """
        found: dict[Captures, list[str]] = {}
        for name in names:
            caught = self.pattern.match(name)
            if caught is not None:
                found.setdefault(tuple(caught[i] for i in self.kept), []).append(name)
        if not self.gathers:
            return {captures: name for captures, [name] in found.items()}
        for captures, members in found.items():
            members.sort(key=lambda name: in_order(self.gathered(name)))
            self._check_gaps(captures, members, who)
        return {captures: tuple(members) for captures, members in found.items()}

    def _check_gaps(self, captures: Captures, members: Sequence[str], who: str) -> None:
        for caught in zip(*map(self.gathered, members), strict=True):
            if not all(text.isdecimal() for text in caught):
                continue
            numbers = {int(text) for text in caught}
            gaps = sorted(set(range(min(numbers), max(numbers))) - numbers)
            if gaps:
                raise MappingError(
                    f"{who}: {self.spell(captures)!r} gathers {len(numbers)} numbers from "
                    f"{min(numbers)} to {max(numbers)}, and {listed(gaps)} missing. A tuple would "
                    "close the gap without a word: store what is missing, or narrow the pattern."
                )


def sides(
    who: str, sources: Sequence[str], targets: Sequence[str]
) -> tuple[tuple[Side, ...], tuple[Side, ...]]:
    """The sides of a transform, sources and targets.

    Raises:
        MappingError: the wildcards of a pattern cannot be paired with those of the others.
    """
    taken, made = [Pattern(text) for text in sources], [Pattern(text) for text in targets]
    most = max(len(pattern.wildcards) for pattern in taken)
    shared = min(most, *(len(pattern.wildcards) for pattern in made))
    model = next(p for p in (*made, *taken) if len(p.wildcards) == shared)
    for pattern in (*taken, *made):
        if 0 < len(pattern.wildcards) < shared:
            raise MappingError(
                f"{who}: {pattern.text!r} has {len(pattern.wildcards)} wildcards, but {shared} "
                f"tell the calls apart, as in {model.text!r}. Give it as many, or none if it is "
                "for every call."
            )
    return (
        tuple(Side(pattern, _kept(who, pattern, model)) for pattern in taken),
        tuple(Side(pattern, _kept(who, pattern, model)) for pattern in made),
    )


def _kept(who: str, pattern: Pattern, model: Pattern) -> tuple[int, ...]:
    """The wildcards of ``pattern`` that pair with those of ``model``, which has the fewest.

    Those that stand after the same words; where words say nothing, the first.
    """
    if len(pattern.wildcards) < len(model.wildcards):
        return ()
    words, wanted = _words(pattern), _words(model)

    def alike(chosen: tuple[int, ...]) -> int:
        return sum(words[i] == word for i, word in zip(chosen, wanted, strict=True))

    kept = max(combinations(range(len(words)), len(wanted)), key=alike)
    kinds = tuple(pattern.wildcards[i] for i in kept)
    if kinds != model.wildcards:
        raise MappingError(
            f"{who}: the wildcards of {pattern.text!r} and {model.text!r} differ, {list(kinds)} "
            f"against {list(model.wildcards)}. Give both the same wildcards in the same order."
        )
    return kept


def _words(pattern: Pattern) -> list[str]:
    """The word before each wildcard."""
    texts = pattern.spell(("\0",) * len(pattern.wildcards)).split("\0")[:-1]
    return [text.rstrip(".").rpartition(".")[2] for text in texts]


class Keys:
    """The keys of a model, and those that the targets of a call mean."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self._tables: dict[Side, dict[Captures, Given]] = {}

    def of(self, side: Side, captures: Captures) -> Given | None:
        """The key, or those that a wildcard stands for; None if the model has none."""
        if not side.gathers:
            name = side.spell(captures)
            return name if name in self.names else None
        if side not in self._tables:
            self._tables[side] = side.table(self.names, "the model")
        return self._tables[side].get(captures)


def flat(given: Given) -> tuple[str, ...]:
    """The names behind one argument or result."""
    return (given,) if isinstance(given, str) else given


def in_order(captures: Captures) -> tuple[tuple[tuple[int, int, str], ...], ...]:
    """A sort key under which 2 comes before 10."""
    return tuple(map(natural, captures))


def listed(items: Iterable[object]) -> str:
    """``'a', 'b', 'c' and 4 more are``, for a sentence that goes on."""
    texts = [repr(item) for item in items]
    more = f" and {len(texts) - 3} more" if texts[3:] else ""
    return f"{', '.join(texts[:3])}{more} {'are' if texts[1:] else 'is'}"
