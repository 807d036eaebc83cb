"""What one rank knows after planning, as plain data, and what all ranks know together.

A stage of a pipeline plans its own layers. That a stored tensor is wanted by nobody, or that a skip
prefix hits nothing, only all stages know: so each gives its claims and the stored names it used,
and the conclusions are made of all of them, as one process makes them of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bioinit.errors import Problem
from bioinit.ranks import World
from bioinit.report import Claim

_NONE = 0
"""Where the names of a claim's sources stand, if it has none; its own name is left out."""


class Evidence(NamedTuple):
    """What is known of some targets and of the stored tensors that they want."""

    claims: tuple[Claim, ...]
    used: Collection[str]
    """Stored names that a target is made of, or compared with."""
    parts: Mapping[str, Sequence[str]]
    """For used names: canonical tensors inside that no target of this evidence wants."""
    asked: Collection[str] = ()
    """Canonical tensors that are wanted and share their stored tensor with others."""
    problems: tuple[Problem, ...] = ()
    lacking: tuple[str, ...] = ()
    """Targets of which nothing is stored."""
    misfits: Mapping[str, str] = {}
    padding: Mapping[str, int] = {}

    def merged(self, other: Evidence) -> Evidence:
        """This and another rank's, of which this one's stands first."""
        asked = {*self.asked, *other.asked}
        claims = {claim.key: claim for claim in (*other.claims, *self.claims)}
        order = _ordered([c.key for c in self.claims], [c.key for c in other.claims])
        parts: dict[str, Sequence[str]] = {}
        for name in dict.fromkeys((*self.parts, *other.parts)):
            both = dict.fromkeys((*self.parts.get(name, ()), *other.parts.get(name, ())))
            left = [key for key in both if key not in asked]
            if left:
                parts[name] = left
        place = {key: number for number, key in enumerate(order)}
        problems = dict.fromkeys((*self.problems, *other.problems))
        return Evidence(
            tuple(claims[key] for key in order),
            {*self.used, *other.used},
            parts,
            asked,
            tuple(sorted(problems, key=lambda problem: place.get(problem.key, len(place)))),
            tuple(dict.fromkeys((*self.lacking, *other.lacking))),
            {**other.misfits, **self.misfits},
            {**other.padding, **self.padding},
        )

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it. What many claims have in common is written once."""
        kinds: dict[tuple[Any, ...], int] = {}
        rows: list[list[Any]] = []
        claimed: set[str] = set()
        for key, *common, sources, size, cast, init in self.claims:
            number = kinds.setdefault((*common, size, cast, init), len(kinds))
            rows.append([key, number, *([] if sources == (key,) else sources or [_NONE])])
            claimed.update(sources)
        return {
            "kinds": list(kinds),
            "claims": rows,
            "used": sorted(name for name in self.used if name not in claimed),
            "parts": {name: list(keys) for name, keys in self.parts.items()},
            "asked": sorted(self.asked),
            "problems": [[p.kind, p.key, p.message, p.cure] for p in self.problems],
            "lacking": list(self.lacking),
            "misfits": dict(self.misfits),
            "padding": dict(self.padding),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Evidence:
        claims = []
        used = set(plain["used"])
        kinds = [(tuple(shape), *rest) for shape, *rest in plain["kinds"]]
        for key, number, *sources in plain["claims"]:
            shape, dtype, kind, rule, size, cast, init = kinds[number]
            names = () if sources == [_NONE] else tuple(sources or [key])
            claims.append(Claim(key, shape, dtype, kind, rule, names, size, cast, init))
            used.update(names)
        return cls(
            tuple(claims),
            used,
            plain["parts"],
            plain["asked"],
            tuple(Problem(*each) for each in plain["problems"]),
            tuple(plain["lacking"]),
            plain["misfits"],
            plain["padding"],
        )


def unite(world: World, mine: Evidence) -> Evidence:
    """What all ranks of ``world`` know; ``mine`` itself where all know the same.

    Ranks that divide each tensor make the same claims, which a digest tells; of those that differ,
    the first of a kind sends its own.
    """
    if world.size == 1:
        return mine
    plain = mine.to_plain()
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    first: dict[str, int] = world.united({digest: world.rank}, lambda low, high: high | low)
    if len(first) == 1:
        return mine
    given = plain if first[digest] == world.rank else None
    united = world.united(given, _merged)
    assert united is not None
    return Evidence.from_plain(united)


def _merged(low: dict[str, Any] | None, high: dict[str, Any] | None) -> dict[str, Any] | None:
    if low is None or high is None:
        return low if high is None else high
    return Evidence.from_plain(low).merged(Evidence.from_plain(high)).to_plain()


_Tree = dict[str, Any]


def _ordered(low: Sequence[str], high: Sequence[str]) -> list[str]:
    """Keys of both in the order of one state dict: numbers ascend, else each after its neighbor.

    >>> _ordered(["embed.w", "layers.0.w", "layers.4.w"], ["layers.2.w", "norm.w"])
    ['embed.w', 'layers.0.w', 'layers.2.w', 'layers.4.w', 'norm.w']
    """
    return list(low) if low == high else [*_keys(_grafted(_tree(low), _tree(high)), "")]


def _tree(keys: Iterable[str]) -> _Tree:
    root: _Tree = {}
    for key in keys:
        node = root
        for segment in key.split("."):
            node = node.setdefault(segment, {})
        node[""] = {}
    return root


def _keys(tree: _Tree, path: str) -> Iterable[str]:
    for name, node in tree.items():
        if name:
            yield from _keys(node, f"{path}.{name}" if path else name)
        else:
            yield path


def _grafted(low: _Tree, high: _Tree) -> _Tree:
    names = list(low)
    others = list(high)
    for number, name in enumerate(others):
        if name in low:
            continue
        before = next((n for n in reversed(others[:number]) if n in names), None)
        after = next((n for n in others[number:] if n in low), None)
        if before is not None:
            names.insert(names.index(before) + 1, name)
        elif after is not None:
            names.insert(names.index(after), name)
        else:
            names.append(name)
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    return {name: _grafted(low.get(name, {}), high.get(name, {})) for name in names}
