"""The process groups in which replicas send to each other, and when each has its turn.

They are made by all ranks in one order, and so under one name for each: torch names a group that
only its members make by how many groups this process has, and members may have different numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed

from bioinit.ranks import World

Ranks = tuple[int, ...]

TIMEOUT = timedelta(seconds=60)
"""For one piece. All of a group are there when it is sent: none waits for a disk, or for a rank
that still sends to others."""

_known: dict[tuple[Ranks, str], Any] = {}
"""Those of this process, for its later starts."""


class Groups(NamedTuple):
    """What ``everybodys`` groups are, and how to use those of this rank."""

    everybodys: list[Ranks]
    kind: str

    @classmethod
    def of_all(cls, mine: Iterable[Ranks], device: torch.device, world: World) -> Groups:
        """Make what any rank lacks; every rank calls it, even with no group of its own.

        Args:
            mine: the ranks of each group that this rank sends in.
            device: where what is sent lies.
            world: all ranks.
        """
        kind = device.type
        here = {"all": sorted(mine), "lacking": [r for r in mine if not _is_alive((r, kind))]}
        said = world.united({name: _lists(each) for name, each in here.items()}, _both)
        for ranks in map(tuple, said["lacking"]):
            is_cpu = kind == "cpu"
            made = distributed.new_group(
                list(ranks),
                backend="gloo" if is_cpu else None,
                timeout=TIMEOUT if is_cpu else None,
            )
            if world.rank in ranks:
                _leave((ranks, kind))
                _known[ranks, kind] = made
        return cls([tuple(ranks) for ranks in said["all"]], kind)

    @contextmanager
    def used(self, ranks: Ranks) -> Iterator[Any]:
        """The group of ``ranks``. After an error nobody knows what was sent in it: it is left."""
        try:
            yield _known[ranks, self.kind]
        except BaseException:
            _leave((ranks, self.kind))
            raise


def rounds(groups: Iterable[Ranks]) -> list[list[Ranks]]:
    """``groups`` in as many turns as it takes for no rank to be in two groups of one turn."""
    turns: list[list[Ranks]] = []
    busy: list[set[int]] = []
    for ranks in sorted(groups):
        free = (number for number, each in enumerate(busy) if each.isdisjoint(ranks))
        number = next(free, len(turns))
        if number == len(turns):
            turns.append([])
            busy.append(set())
        turns[number].append(ranks)
        busy[number].update(ranks)
    return turns


def _lists(groups: Iterable[Ranks]) -> list[list[int]]:
    return [list(ranks) for ranks in groups]


def _both(some: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _lists(sorted({*map(tuple, some[name]), *map(tuple, more[name])})) for name in some
    }


def _leave(key: tuple[Ranks, str]) -> None:
    """Destroy what is known by ``key``, if there is anything."""
    group = [_known.pop(key, None)]
    if group[0] is None or not _lives(group[0]):
        return

    def end() -> None:
        distributed.destroy_process_group(group.pop())

    # It may wait for what others never send, and this rank has an error to tell.
    threading.Thread(target=end, name="bioinit-group", daemon=True).start()


def _is_alive(key: tuple[Ranks, str]) -> bool:
    return key in _known and _lives(_known[key])


def _lives(group: Any) -> bool:
    """Whether the process group that it is part of is still there."""
    try:
        return bool(distributed.get_process_group_ranks(group))
    except KeyError:
        return False
