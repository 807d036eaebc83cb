"""The processes that share one model: who they are, whether they agree, and how one fails for all.

Everything here goes through the store at which torch.distributed met, never through collectives: a
store has timeouts, and a rank that failed can still say why. One process alone is a :data:`ALONE`,
for which all of this is nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bioinit.errors import ConfigError
from bioinit.ranks.failure import Failure
from bioinit.ranks.line import Line
from bioinit.ranks.meeting import meet, part, prefixed
from bioinit.ranks.store import Store
from bioinit.ranks.watch import PACE, Pace, named

__all__ = ["ALONE", "World", "joined", "part", "together"]

T = TypeVar("T")

_SHOWN_FACTS = 20
_SHOWN_KINDS = 4
_SHOWN_LETTERS = 300


@dataclass(frozen=True)
class World:
    """The ranks that do this work together, from the side of one of them.

    All methods but :meth:`check` are called by every rank, in the same order, and raise the error
    of a rank that failed.
    """

    rank: int = 0
    size: int = 1
    _line: Line | None = field(default=None, repr=False, compare=False)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare what every rank is about to do.

        Args:
            facts: what must be equal, by name.

        Raises:
            ConfigError: a rank differs; all ranks raise, and the message names it and the facts.
        """
        if self._line is None:
            return
        digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
        # Of each digest: how many ranks have it, and the first few of them.
        found: dict[str, Any] = self._line.united({digest: [1, [self.rank]]}, _counted, "agree")
        if len(found) == 1:
            return
        kinds = sorted(found.values(), key=lambda each: (-each[0], each[1][0]))[:_SHOWN_KINDS]
        first = [ranks[0] for _, ranks in kinds]
        said = self._line.united(
            {str(self.rank): dict(facts)} if self.rank in first else {},
            lambda a, b: a | b,
            "agree: what differs",
        )
        raise ConfigError(_disagreement(kinds, said))

    def united(self, mine: T, merge: Callable[[T, T], T]) -> T:
        """What all ranks know, put together pairwise by ``merge``; the same on every rank.

        Args:
            mine: plain data, as JSON has it.
            merge: associative; the lower rank's comes first.
        """
        return self._united(mine, merge, "united")

    def gathered(self, mine: T) -> list[T]:
        """What every rank gives, by rank, on all of them. Plain data, and little of it."""
        return self._united([mine], lambda a, b: a + b, "gathered")

    def _united(self, mine: T, merge: Callable[[T, T], T], label: str) -> T:
        return mine if self._line is None else self._line.united(mine, merge, label)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The name of the host of each rank; asked for by every rank, as all else is."""
        if self._line is None:
            return (socket.gethostname(),) * self.size
        if not self._line.hosts:
            each = self._line.united([socket.gethostname()], lambda a, b: a + b, "hosts")
            self._line.hosts = tuple(each)
        return self._line.hosts

    @property
    def ended_by(self) -> Failure | None:
        """What ended the work of all; None if nothing did, or if this rank does not know."""
        return None if self._line is None else self._line.verdict

    def check(self) -> None:
        """Raise the error of another rank, if one has failed. Cheap; between any two steps."""
        if self._line is not None:
            self._line.check()


ALONE = World()

_here: ContextVar[World | None] = ContextVar("world", default=None)
_meetings = itertools.count(1)


@contextmanager
def together(device: str | None = None) -> Iterator[World]:
    """The ranks that torch.distributed or its launcher made of us; :data:`ALONE` for one process.

    Leaving it waits for all the others; an error that leaves it on one rank leaves it on all.
    Inside another one it is the same world.

    Args:
        device: where the model will live, ``cpu`` or ``cuda``; chooses how groups communicate, if
            the ranks have yet to meet.

    Raises:
        ConfigError: the launcher's variables are incomplete, or the others did not come.
    """
    world = _here.get()
    if world is not None:
        yield world
        return
    store, rank, size = meet(device)
    if store is None:
        yield ALONE if size == 1 else World(rank, size)
        return
    number = next(_meetings)
    # The launcher starts ranks apart; those that have met do the same since.
    pace = PACE if number == 1 else PACE._replace(join=min(PACE.join, PACE.again))
    with joined(store, rank, size, f"bioinit/{number}", pace) as world:
        yield world


@contextmanager
def joined(
    store: Store, rank: int, size: int, prefix: str, pace: Pace | None = None
) -> Iterator[World]:
    """The world of ``size`` ranks that share ``store``, under ``prefix``."""
    line = Line(prefixed(store, prefix), rank, size, pace or PACE)
    world = World(rank, size, line)
    token = _here.set(world)
    try:
        with line.open():
            yield world
    finally:
        _here.reset(token)


def _counted(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Counts of each digest added, and its first ranks."""
    found = dict(low)
    for digest, (count, ranks) in high.items():
        known, first = found.get(digest, (0, []))
        found[digest] = [known + count, (first + ranks)[:9]]
    return found


def _disagreement(kinds: list[Any], said: Mapping[str, Mapping[str, str]]) -> str:
    """Which ranks differ from most of the others, and in what."""
    (_, (reference, *_)), *others = kinds
    lines = []
    for count, ranks in others:
        mine, theirs = said[str(reference)], said[str(ranks[0])]
        facts = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        who = named(tuple(ranks), count=count)
        verb = "differs" if count == 1 else "differ"
        lines.append(f"{who} {verb} from rank {reference} in {', '.join(facts[:_SHOWN_FACTS])}:")
        for name in facts[:_SHOWN_FACTS]:
            lines.append(
                f"  {name}: {_value(mine, name)} on rank {reference}, "
                f"{_value(theirs, name)} on rank {ranks[0]}"
            )
        if len(facts) > _SHOWN_FACTS:
            lines.append(f"  ... and {len(facts) - _SHOWN_FACTS} more facts.")
    lines.append("Start all ranks with the same recipe, overrides, files and versions.")
    return "the ranks are not about to do the same: " + "\n".join(lines)


def _value(facts: Mapping[str, str], name: str) -> str:
    if name not in facts:
        return "nothing"
    text = repr(facts[name])
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}... ({len(text)})"
