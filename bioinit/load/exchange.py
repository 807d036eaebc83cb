"""Replicas that divide the reading among themselves, and send each other what they have read.

Ranks that hold the very same boxes need the very same bytes. Their local memory is cut into
stretches, each of which one of them reads; when all have read, every stretch is sent from the
memory it lies in to the memory it belongs in. So storage is read once, and nothing is held twice
but what is too small to be sent by itself.

Who reads what follows from shapes and places of the plan alone: every replica works it out for
itself, and a second start of the same plan in one process finds it again.
"""

from __future__ import annotations

import functools
import operator
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import distributed

from bioinit.layout import Overlap, restrict
from bioinit.load.groups import Groups, rounds
from bioinit.load.transfer import Progress
from bioinit.plan import Copy, TargetPlan
from bioinit.ranks import ALONE, World
from bioinit.targets import Target

CUT_BYTES = 4096
"""Local memory is cut at multiples of this: a page, and what a file system reads at least."""

PIECE_BYTES = 64 * 2**20
"""The most that is sent at once."""

BUNDLE_BYTES = 4 * 2**20
"""What is shorter than a quarter of this is sent in a buffer together with its neighbours."""

IN_FLIGHT = 4


class Share(NamedTuple):
    """What there is to divide: a target, or all the targets that one conversion makes.

    ``sizes`` count the elements of local memory of each of ``keys``. Cuts fall on multiples of
    ``grain`` elements; with 0, one rank reads all of it.
    """

    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    cost: int
    grain: int


class Stretch(NamedTuple):
    """Elements [``low``, ``high``) of the local memory of ``key``, and who reads them."""

    key: str
    low: int
    high: int
    reader: int


class Packet(NamedTuple):
    """Stretches of one reader that are sent at once; several only if they are small."""

    stretches: tuple[Stretch, ...]
    reader: int


def is_worth_it(mode: str, targets: Mapping[str, Target], world: World) -> bool:
    """Whether replicas share the reading: the same answer on every rank.

    Args:
        mode: ``on``, ``off``, or ``auto``: where replicas sit on different hosts. On one host the
            file system reads once for all of them, and memory is faster than what lies between.
        targets: of this rank.
        world: all ranks; every one of them asks.
    """
    if world.size == 1 or mode == "off":
        return False
    if mode == "on":
        return True
    hosts = world.hosts
    held = {target.replicas for target in targets.values()}
    is_apart = any(len({hosts[rank] for rank in ranks}) > 1 for ranks in held)
    return world.united(is_apart, operator.or_)


def heeding(world: World, progress: Progress | None) -> Progress | None:
    """``progress``, which ends the reading here once another rank has failed."""
    if world.size == 1:
        return progress

    def arrived(size: int) -> None:
        world.check()
        if progress is not None:
            progress(size)

    return arrived


class Exchange:
    """Who reads which part of what this rank shares with others; :data:`NOBODY` shares nothing."""

    def __init__(
        self,
        shares: Mapping[tuple[int, ...], tuple[Share, ...]],
        memory: Mapping[str, torch.Tensor],
        world: World = ALONE,
    ) -> None:
        """Divide ``shares``, by the ranks that have them, whose ``memory`` is dense."""
        self._world = world
        self._memory = memory
        self._stretches: dict[tuple[int, ...], tuple[Stretch, ...]] = {}
        self._mine: dict[str, list[Stretch]] = {}
        for ranks, each in shares.items():
            self._stretches[ranks] = divided(each, len(ranks))
            for stretch in self._stretches[ranks]:
                mine = self._mine.setdefault(stretch.key, [])
                if ranks[stretch.reader] == world.rank:
                    mine.append(stretch)

    def reads(self, key: str) -> bool:
        """Whether anything of ``key`` is read here."""
        return key not in self._mine or bool(self._mine[key])

    def mine(self, key: str, copies: Iterable[Copy]) -> Iterator[Copy]:
        """The parts of ``copies`` into ``key`` that are read here."""
        stretches = self._mine.get(key)
        if stretches is None:
            yield from copies
            return
        for copy in copies:
            for stretch in stretches:
                for overlap in restrict(copy.overlap, stretch.low, stretch.high):
                    yield copy._replace(overlap=overlap)

    def carry_out(self, device: torch.device) -> None:
        """Send what was read here, and receive what others have read.

        Every rank calls it, even one that shares nothing.

        Raises:
            BioinitError: another rank failed to read.
        """
        if self._world.size == 1:
            return
        # Whoever answers has read everything: from here on, only a process that dies keeps others.
        groups = Groups.of_all(self._stretches, device, self._world)
        for turn in rounds(groups.everybodys):
            for ranks in turn:
                if ranks in self._stretches:
                    with groups.used(ranks) as group:
                        self._send(ranks, group)
            # A rank is in several groups: nobody begins one while a partner is in another.
            self._world.united(0, max)

    def _send(self, ranks: tuple[int, ...], group: Any) -> None:
        under_way: deque[_Flight] = deque()
        for packet in packets(self._stretches[ranks], self._width):
            if len(under_way) == IN_FLIGHT:
                under_way.popleft().land(self._world)
            under_way.append(self._sent(packet, ranks, group))
        for flight in under_way:
            flight.land(self._world)

    def _width(self, key: str) -> int:
        return self._memory[key].element_size()

    def _sent(self, packet: Packet, ranks: tuple[int, ...], group: Any) -> _Flight:
        """Start to send or to receive ``packet``."""
        places = [self._bytes(stretch) for stretch in packet.stretches]
        source = ranks[packet.reader]
        parts: list[torch.Tensor] = []
        wire = places[0]
        if len(places) > 1:
            wire = torch.empty(
                sum(place.numel() for place in places), dtype=torch.uint8, device=wire.device
            )
            parts = list(wire.split([place.numel() for place in places]))  # type: ignore[no-untyped-call]
            if source == self._world.rank:
                _copy(parts, places)
                parts = []
        work = distributed.broadcast(wire, source, group=group, async_op=True)
        return _Flight(work, parts, places)

    def _bytes(self, stretch: Stretch) -> torch.Tensor:
        memory = self._memory[stretch.key]
        size = stretch.high - stretch.low
        start = memory.storage_offset() + stretch.low
        return memory.as_strided((size,), (1,), start).view(torch.uint8)


class _Flight(NamedTuple):
    """Something that is being sent, and what is copied where once it is there."""

    work: Any
    parts: Sequence[torch.Tensor]
    places: Sequence[torch.Tensor]

    def land(self, world: World) -> None:
        pause = 1e-4
        while not self.work.is_completed():
            world.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        self.work.wait()
        if self.parts:
            _copy(self.places, self.parts)


NOBODY = Exchange({}, {})


def shared(
    plans: Mapping[str, TargetPlan],
    targets: Mapping[str, Target],
    memory: Mapping[str, torch.Tensor],
    world: World,
) -> Exchange:
    """Divide what this rank loads among the ranks that load the same.

    Args:
        plans: of this rank, by key.
        targets: by key, with their replicas.
        memory: local memory by key.
        world: all ranks.
    """
    found: dict[tuple[int, ...], list[tuple[tuple[int, int], Share]]] = {}
    converted: dict[int, list[str]] = {}
    for key, planned in plans.items():
        ranks = targets[key].replicas
        if len(ranks) < 2 or not _is_dense(memory[key]):
            continue
        if planned.conversion is not None:
            converted.setdefault(id(planned.conversion), []).append(key)
            continue
        cost = sum(copy.bytes for copy in planned.all_copies())
        if cost:
            share = Share((key,), (memory[key].numel(),), cost, _grain(planned, memory[key]))
            found.setdefault(ranks, []).append((_place(planned.copies), share))
    for identity, keys in converted.items():
        ranks = targets[keys[0]].replicas
        whole = {key for key, p in plans.items() if id(p.conversion) == identity}
        # Whoever runs it makes all of it.
        if whole == set(keys) and all(targets[key].replicas == ranks for key in keys):
            sizes = tuple(memory[key].numel() for key in keys)
            share = Share(tuple(keys), sizes, plans[keys[0]].claim.bytes, 0)
            found.setdefault(ranks, []).append(((-1, -1), share))
    # In the order of the files, so that each reads a stretch of them.
    return Exchange(
        {ranks: tuple(share for _, share in sorted(each)) for ranks, each in found.items()},
        memory,
        world,
    )


@functools.lru_cache(maxsize=64)
def divided(shares: tuple[Share, ...], count: int) -> tuple[Stretch, ...]:
    """``shares`` in order, cut so that each of ``count`` readers reads about as much."""
    total = sum(share.cost for share in shares)
    found: list[Stretch] = []
    done = 0
    for share in shares:
        after = done + share.cost
        if not share.grain:
            reader = min(count - 1, (done + after) * count // (2 * total))
            for key, size in zip(share.keys, share.sizes, strict=True):
                if size:
                    found.append(Stretch(key, 0, size, reader))
            done = after
            continue
        [key], [size] = share.keys, share.sizes
        low = 0
        for reader in range(done * count // total, count):
            end = (reader + 1) * total // count
            high = size
            if end < after and reader < count - 1:
                high = (end - done) * size // share.cost // share.grain * share.grain
            if high > low:
                found.append(Stretch(key, low, high, reader))
                low = high
            if low == size:
                break
        done = after
    return tuple(found)


def packets(stretches: Iterable[Stretch], width: Any) -> Iterator[Packet]:
    """What is sent at once, the readers by turns; ``width`` gives the bytes of a key's elements."""
    by_reader: dict[int, list[Packet]] = {}
    bundles: dict[int, tuple[list[Stretch], int]] = {}
    for stretch in stretches:
        each = width(stretch.key)
        size = (stretch.high - stretch.low) * each
        sent = by_reader.setdefault(stretch.reader, [])
        if size >= BUNDLE_BYTES // 4:
            step = PIECE_BYTES // each
            for low in range(stretch.low, stretch.high, step):
                piece = stretch._replace(low=low, high=min(stretch.high, low + step))
                sent.append(Packet((piece,), stretch.reader))
            continue
        bundle, held = bundles.get(stretch.reader, ([], 0))
        if held + size > BUNDLE_BYTES:
            sent.append(Packet(tuple(bundle), stretch.reader))
            bundle, held = [], 0
        bundle.append(stretch)
        bundles[stretch.reader] = (bundle, held + size)
    for reader, (bundle, _) in bundles.items():
        by_reader[reader].append(Packet(tuple(bundle), reader))
    for turn in zip_longest(*(by_reader[reader] for reader in sorted(by_reader))):
        yield from (packet for packet in turn if packet is not None)


def _grain(planned: TargetPlan, memory: torch.Tensor) -> int:
    """Where the memory may be cut; 0 where a part of it lies all over what is stored."""
    if not all(_keeps_order(copy.overlap) for copy in planned.all_copies()):
        return 0
    return max(1, CUT_BYTES // memory.element_size())


def _keeps_order(overlap: Overlap) -> bool:
    """Whether what comes later in memory comes later in the file, too."""
    steps = sorted(zip(overlap.target_strides, overlap.source_strides, strict=True), reverse=True)
    sources = [source for _, source in steps]
    return sources == sorted(sources, reverse=True)


def _place(copies: Sequence[Copy]) -> tuple[int, int]:
    """Where what is read begins: a file's number, and a position."""
    return min(
        (copy.file, copy.offset + copy.overlap.source_start * copy.dtype.itemsize)
        for copy in copies
    )


def _is_dense(memory: torch.Tensor) -> bool:
    """Whether it is one stretch of storage, in whatever order."""
    span = 1 + sum((n - 1) * s for n, s in zip(memory.shape, memory.stride(), strict=True))
    return bool(memory.numel()) and span == memory.numel()


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
