"""What one rank knows after planning, as plain data, and what all ranks know together.

A stage of a pipeline plans its own layers. That a stored tensor is wanted by nobody, or that a skip
prefix hits nothing, only all stages know: so each gives its claims and the stored names it used,
and the conclusions are made of all of them, as one process makes them of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bioinit import collector
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

    @classmethod
    def of_all(cls, known: Sequence[Evidence]) -> Evidence:
        """What several ranks know together; the first one's word goes where they differ."""
        asked = {key for each in known for key in each.asked}
        claims = {claim.key: claim for each in reversed(known) for claim in each.claims}
        order = _ordered([claim.key for claim in each.claims] for each in known)
        parts: dict[str, Sequence[str]] = {}
        for name in dict.fromkeys(name for each in known for name in each.parts):
            left = dict.fromkeys(key for each in known for key in each.parts.get(name, ()))
            kept = [key for key in left if key not in asked]
            if kept:
                parts[name] = kept
        problems = dict.fromkeys(problem for each in known for problem in each.problems)
        place = {key: number for number, key in enumerate(order)} if problems else {}
        return cls(
            tuple(claims[key] for key in order),
            {name for each in known for name in each.used},
            parts,
            asked,
            tuple(sorted(problems, key=lambda problem: place.get(problem.key, len(place)))),
            tuple(dict.fromkeys(key for each in known for key in each.lacking)),
            {name: why for each in reversed(known) for name, why in each.misfits.items()},
            {name: rows for each in reversed(known) for name, rows in each.padding.items()},
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
    given = [plain] if first[digest] == world.rank else []
    with collector.paused():
        told = world.united(given, lambda low, high: low + high)
        return Evidence.of_all([Evidence.from_plain(each) for each in told])


class _Node(dict[str, "_Node"]):
    """Segments of keys that follow a path; the empty one ends a key."""


def _ordered(lists: Iterable[Sequence[str]]) -> list[str]:
    """Keys of all in the order of one state dict: numbers ascend, else each after its neighbor.

    >>> _ordered([["embed.w", "layers.0.w", "layers.4.w"], ["layers.2.w", "norm.w"]])
    ['embed.w', 'layers.0.w', 'layers.2.w', 'layers.4.w', 'norm.w']
    """
    whole = _Node()
    for keys in lists:
        _graft(whole, _tree(keys))
    return [*_keys(whole, "")]


def _tree(keys: Iterable[str]) -> _Node:
    root = _Node()
    for key in keys:
        node = root
        for segment in key.split("."):
            held = node.get(segment)
            if held is None:
                held = node[segment] = _Node()
            node = held
        node[""] = _Node()
    return root


def _keys(tree: _Node, path: str) -> Iterator[str]:
    for name, node in tree.items():
        if name:
            yield from _keys(node, f"{path}.{name}" if path else name)
        else:
            yield path


def _graft(whole: _Node, branch: _Node) -> None:
    """Put what is new of ``branch`` where it belongs in ``whole``."""
    new = [name for name in branch if name not in whole]
    for name, node in branch.items():
        if name in whole:
            _graft(whole[name], node)
        else:
            whole[name] = node
    if not new or len(new) == len(whole):
        return
    names = list(whole)
    if all(map(str.isdecimal, names)):
        names.sort(key=int)
    else:
        names = names[: -len(new)]
        _insert(names, list(branch))
    held = dict(whole)
    whole.clear()
    whole.update((name, held[name]) for name in names)


def _insert(names: list[str], others: Sequence[str]) -> None:
    """Put each of ``others`` after the one before it, or before the first that is known."""
    known = set(names)
    first = next((names.index(name) for name in others if name in known), len(names))
    for name in others:
        if name in known:
            first = names.index(name) + 1
        else:
            names.insert(first, name)
            first += 1
