"""Wrapper prefixes: the same names with ``module.`` or ``bert.`` more or less in front.

Training wrappers put segments into every key (``module.``, ``_orig_mod.``), and a body saved alone
lacks the segment that its head model has (``bert.``). Both are solved from the names themselves:
ways to take one prefix off and put one on are scored by how many stored names the model then knows,
asked anew for each way, since a dialect may rename what is spelled rightly and nothing else. One
best way is applied and said; two equally good ways are refused with their scores.

>>> keys = {"encoder.w", "encoder.b"}
>>> found = solve(["module.encoder.w", "module.encoder.b"], keys.intersection, keys)
>>> found.spell("module.encoder.w"), found.note
('encoder.w', "stored names are read without 'module.' in front: 2 of 2 match, 0 as they are")
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bioinit.errors import AmbiguousFormat
from bioinit.keys import template

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Segments that wrappers put anywhere into a name; no architecture uses them for itself."""

Known = Callable[[Mapping[str, str]], Collection[str]]
"""Given names as a checkpoint might spell them, each with the stored name that it is a spelling of:
those that the model wants. All are asked at once, because a dialect may rename by what else there
is."""

Change = tuple[str, str]
"""What is taken off the front of a name, and what is put there."""

_DEEPEST = 3
_MOST_TRIED = 12


@dataclass(frozen=True)
class Spelling:
    """How stored names are read: per template, what is taken off the front and what is put there.

    ``note`` is the sentence the plan prints, empty when names are read as they are.
    """

    changes: Mapping[str, Change]
    unwraps: bool = False
    note: str = ""

    def spell(self, name: str) -> str:
        """The stored name as the dialect spells it."""
        if self.unwraps:
            name = _unwrapped(name)
        if not self.changes:
            return name
        change = self.changes.get(template(name))
        return name if change is None else change[1] + name.removeprefix(change[0])


AS_STORED = Spelling({})


def solve(stored: Sequence[str], known: Known, model_keys: Collection[str] = ()) -> Spelling:
    """The one prefix change under which the model knows the most of the stored names.

    Args:
        stored: names in the checkpoint.
        known: which names the model wants, as the disk dialect spells them; see :data:`Known`.
        model_keys: names whose leading segments are tried as prefixes to put in front.

    Raises:
        AmbiguousFormat: two changes match equally many, and take other names or lead to others.
    """
    if set(model_keys).issuperset(stored):
        return AS_STORED
    unwraps = _any_wrapped(stored) and not _any_wrapped(model_keys)
    kinds: dict[str, _Kind] = {}
    for name in stored:
        read = _unwrapped(name) if unwraps else name
        kind = template(read)
        if kind in kinds:
            kinds[kind].count += 1
        else:
            kinds[kind] = _Kind(name, read)
    found = known({kind.read: kind.name for kind in kinds.values()})
    fitting = {text for text, kind in kinds.items() if kind.read in found}
    before = sum(kinds[text].count for text in fitting)
    wrapped = "without the segments of training wrappers" if unwraps else ""
    as_read = Spelling({}, unwraps, f"stored names are read {wrapped}" if unwraps else "")
    if len(fitting) == len(kinds):
        return as_read
    tried = [_Try(change, kinds, fitting, known) for change in _changes(kinds, fitting, model_keys)]
    # A minority of names that would also match elsewhere proves nothing.
    tried = [each for each in tried if each.gained and each.matched > before]
    if not tried:
        return as_read
    best = max(each.gain for each in tried)
    winners = [each for each in tried if each.gain == best]
    if len({each.leads_to for each in winners}) > 1:
        listed = "; ".join(
            f"{_said(each.change)}: {each.matched} match"
            for each in sorted(winners, key=lambda each: each.change)
        )
        raise AmbiguousFormat(
            f"the stored names fit the model in more than one way ({listed}; {before} of "
            f"{len(stored)} match as they are). Rename them, or say which with "
            "bioinit.load_weights(..., mapping={'**': 'prefix.**'})."
        )
    winner = min(winners, key=lambda each: (len("".join(each.change)), each.change))
    note = (
        f"stored names are read {wrapped + ' and ' if wrapped else ''}{_said(winner.change)}: "
        f"{winner.gain + before} of {len(stored)} match, {before} as they are"
    )
    return Spelling(dict.fromkeys(winner.changed, winner.change), unwraps, note)


@dataclass
class _Kind:
    """Stored names of one template: one of them, how it is read without wrappers, how many."""

    name: str
    read: str
    count: int = 1


class _Try:
    """What becomes of all kinds of names under one change."""

    def __init__(
        self, change: Change, kinds: Mapping[str, _Kind], fitting: Collection[str], known: Known
    ) -> None:
        strip, add = self.change = change
        after = {
            text: add + kind.read.removeprefix(strip)
            for text, kind in kinds.items()
            if kind.read.startswith(strip)
        }
        for text, name in tuple(after.items()):
            taken = template(name)
            if taken in fitting and not (strip and taken.startswith(strip)):
                del after[text]  # the checkpoint holds that name, and the model knows it
        found = known({name: kinds[text].name for text, name in after.items()})
        matching = {text for text, name in after.items() if name in found}
        self.matched = sum(kinds[text].count for text in matching)
        self.gained = matching.difference(fitting)
        self.gain = sum(kinds[text].count for text in self.gained)
        self.leads_to = frozenset((text, template(after[text])) for text in self.gained)
        # What nobody knows either way follows the front that it has, if it has one.
        self.changed = [
            text for text in after if text in matching or (strip and text not in fitting)
        ]


def _changes(
    kinds: Mapping[str, _Kind], fitting: Collection[str], model_keys: Collection[str]
) -> Sequence[Change]:
    """The changes that are worth trying, by how many names they turn into keys of the model."""
    live = set(map(template, model_keys))
    rest = {text: kind for text, kind in kinds.items() if text not in fitting}
    strips = {"", *_fronts(kind.read for kind in rest.values())}
    adds = {"", *_fronts(live)}
    promise: dict[Change, int] = {}
    for strip in strips:
        under = [
            (text.removeprefix(strip), k) for text, k in rest.items() if text.startswith(strip)
        ]
        for add in adds:
            if strip != add:
                promise[strip, add] = sum(k.count for tail, k in under if add + tail in live)
    order = sorted(promise, key=lambda c: (-promise[c], len("".join(c)), c))
    return order[:_MOST_TRIED]


def _said(change: Change) -> str:
    strip, add = change
    if not add:
        return f"without {strip!r} in front"
    if not strip:
        return f"with {add!r} in front"
    return f"with {add!r} for {strip!r} in front"


def _fronts(names: Iterable[str]) -> Iterable[str]:
    """Leading segments, dot included, up to a few deep and never through a number."""
    for name in names:
        segments = name.split(".")[:-1]
        for depth in range(1, min(_DEEPEST, len(segments)) + 1):
            if segments[depth - 1].isdigit() or segments[depth - 1] == "*":
                break
            yield ".".join(segments[:depth]) + "."


def _any_wrapped(names: Collection[str]) -> bool:
    text = "\0".join(names)  # looking once for a word is a tenth of taking every name apart
    return any(word in text for word in WRAPPERS) and any(
        WRAPPERS.intersection(name.split(".")) for name in names
    )


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
