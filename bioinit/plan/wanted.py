"""Which stored tensors a process can want at all, so that the others need not be placed.

A rank of thousands owns a few layers and experts. Its targets lead to canonical tensors, and the
rules of the disk, read backwards, from there to the stored names: the cost is what the rank owns,
and a look-up for each other name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from bioinit.errors import MappingError
from bioinit.formats.protocol import StoredTensor
from bioinit.keys import Pattern, loosened, template
from bioinit.layout import Box, Dims, numel
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.rules import Part, Rule
from bioinit.targets import Target

SMALL = 2
"""How many times more is stored than the targets have, for the way back to be worth its cost."""


def wanted(
    targets: Collection[Target], stored: Mapping[str, StoredTensor], names: Names
) -> frozenset[str] | None:
    """Names, as the disk spells them, of all stored tensors that ``targets`` could be made of.

    Some of them may turn out to be of no use, and some not to exist. None if the targets may want
    anything: they are most of what is stored, or a rule cannot be read backwards.
    """
    held = sum(numel(target.shape) for target in targets)
    if not _is_small(held, stored) or not all(map(_is_plain, names.disk.rules)):
        return None
    back = _Back(names.disk)
    found: set[str] = set()
    for target in targets:
        try:
            placed = names.memory.place(target.key, (Box.contiguous(target.shape),))
        except MappingError:
            continue  # its claim says so
        for canonical in dict.fromkeys(key for key, _, _ in placed or ()):
            found.update(back.spellings(canonical))
    return frozenset(found)


def without_use(table: Table) -> Callable[[str], bool]:
    """Whether ``table`` knows a stored name and has no use for it."""
    ends = tuple({rule.pattern.end for rule in table.rules if not rule.parts})

    def is_known(name: str) -> bool:
        rule = table.rule_for(name) if name.endswith(ends) else None
        return rule is not None and not rule.parts

    return is_known


class _Back:
    """The rules of a table from canonical tensors to the names of the dialect."""

    def __init__(self, table: Table) -> None:
        self._lines = [
            (Pattern(loosened(part.to)), rule, part) for rule in table.rules for part in rule.parts
        ]
        self._by_template: dict[str, list[tuple[Rule, Part]]] = {}

    def spellings(self, canonical: str) -> Iterable[str]:
        kind = template(canonical)
        lines = self._by_template.get(kind)
        if lines is None:
            lines = self._by_template[kind] = [
                (rule, part)
                for pattern, rule, part in self._lines
                if pattern.match(canonical) is not None
            ]
        for rule, part in lines:
            found = part.pattern.match(canonical)
            if found is not None:
                yield rule.spell(part.divide(found)[0])


def _is_small(held: int, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether so many elements are a small part of what is stored."""
    counts: dict[Dims, int] = {}
    total = 0
    for shape, _, _, _ in stored.values():
        count = counts.get(shape)
        if count is None:
            count = counts[shape] = numel(shape)
        total += count
        if total > SMALL * held:
            return True
    return False


def _is_plain(rule: Rule) -> bool:
    """Whether a canonical name leads back to one name alone.

    Where wildcards may share a segment, or two of them may be several segments, it could have
    caught the same text in more than one way.
    """
    patterns = (rule.pattern, *(part.pattern for part in rule.parts))
    return not rule.shift and all(map(_is_unambiguous, patterns))


def _is_unambiguous(pattern: Pattern) -> bool:
    segments = pattern.text.replace(r"\*", "").split(".")
    wild = [segment for segment in segments if "*" in segment]
    return all(s in ("*", "**") for s in wild) and wild.count("**") < 2
