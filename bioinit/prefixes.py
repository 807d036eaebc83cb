"""Wrapper prefixes: the same names with ``module.`` or ``bert.`` more or less in front.

Training wrappers put segments into every key (``module.``, ``_orig_mod.``), and a body saved alone
lacks the segment that its head model has (``bert.``). Both are solved from the names themselves:
every way to take one prefix off and put one on is scored by how many stored names the model then
knows. One best way is applied and said; two equally good ways are refused with their scores.

>>> found = solve(["module.encoder.w", "module.encoder.b"], {"encoder.w", "encoder.b"}.__contains__)
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

_DEEPEST = 3


@dataclass(frozen=True)
class Spelling:
    """How stored names are read: per template, what is taken off the front and what is put there.

    ``note`` is the sentence the plan prints, empty when names are read as they are.
    """

    changes: Mapping[str, tuple[str, str]]
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


def solve(
    stored: Sequence[str], knows: Callable[[str], bool], model_keys: Collection[str] = ()
) -> Spelling:
    """The one prefix change under which the model knows the most of the stored names.

    Args:
        stored: names in the checkpoint.
        knows: whether the model wants a tensor of this name, as the disk dialect spells it.
        model_keys: names whose leading segments are tried as prefixes to put in front.

    Raises:
        AmbiguousFormat: two changes lead to different names and match equally many.
    """
    if set(model_keys).issuperset(stored):
        return AS_STORED
    unwraps = any(WRAPPERS.intersection(name.split(".")) for name in stored) and not any(
        WRAPPERS.intersection(key.split(".")) for key in model_keys
    )
    names = [_unwrapped(name) for name in stored] if unwraps else list(stored)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(template(name), []).append(name)
    known_as_is = {kind for kind, members in kinds.items() if knows(members[0])}
    before = sum(len(kinds[kind]) for kind in known_as_is)
    rest = {kind: members for kind, members in kinds.items() if kind not in known_as_is}
    scored: dict[tuple[str, str], dict[str, int]] = {}
    if rest:
        strips = {"", *_fronts(members[0] for members in rest.values())}
        adds = {"", *_fronts(set(map(template, model_keys)))}
        for strip in strips:
            for add in adds:
                matched = {
                    kind: len(members)
                    for kind, members in rest.items()
                    if members[0].startswith(strip) and knows(add + members[0].removeprefix(strip))
                }
                if matched and strip != add:
                    scored[strip, add] = matched
    wrapped = "without the segments of training wrappers" if unwraps else ""
    if not scored:
        return Spelling({}, unwraps, f"stored names are read {wrapped}" if unwraps else "")
    best = max(sum(matched.values()) for matched in scored.values())
    winners = [change for change, matched in scored.items() if sum(matched.values()) == best]
    results = {
        tuple(sorted(add + kind.removeprefix(strip) for kind in scored[strip, add])): (strip, add)
        for strip, add in winners
    }
    if best <= before:  # a minority of names that would also match elsewhere proves nothing
        return Spelling({}, unwraps, f"stored names are read {wrapped}" if unwraps else "")
    if len(results) > 1:
        listed = "; ".join(f"{_said(change)}: {best} match" for change in sorted(winners))
        raise AmbiguousFormat(
            f"the stored names fit the model in more than one way ({listed}; {before} of "
            f"{len(names)} match as they are). Rename them, or say which with "
            "bioinit.load_weights(..., mapping={'**': 'prefix.**'})."
        )
    strip, add = min(winners, key=lambda change: (len(change[0]) + len(change[1]), change))
    note = (
        f"stored names are read {wrapped + ' and ' if wrapped else ''}{_said((strip, add))}: "
        f"{best + before} of {len(names)} match, {before} as they are"
    )
    return Spelling(dict.fromkeys(scored[strip, add], (strip, add)), unwraps, note)


def _said(change: tuple[str, str]) -> str:
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


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
