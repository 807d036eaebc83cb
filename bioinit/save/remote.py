"""The memory of other ranks as files: rank 0 asks for ranges, the others serve until it is done.

Requests and answers go from process to process over a gloo group of their own, so they work beside
NCCL and cross no collective of anybody else. An answer is never larger than what a writer asked
for at once, which is a slab; no rank's memory is ever copied whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from bioinit.errors import StorageError
from bioinit.ranks import World
from bioinit.save.shares import Place
from bioinit.storage import Made, in_memory

_PATIENCE = timedelta(days=7)
"""A rank is asked nothing for as long as others are written. Deaths are noticed by ``ranks``, and
end the connection."""

_DONE, _ASKED = range(2)


class Remote:
    """Rank 0's side: asks one question at a time of each rank, from any thread."""

    def __init__(self, world: World, group: Any) -> None:
        self._world, self._group = world, group
        self._locks = [threading.Lock() for _ in range(world.size)]

    def file(self, place: Place) -> Made:
        """The memory ``place`` of another rank."""
        rank, number, size, key = place

        def make(offset: int, length: int) -> memoryview:
            return self._range(rank, number, offset, length)

        return in_memory(f"{key} of rank {rank}", size, make)

    def end(self) -> None:
        """Let the others go; one that is gone already keeps nobody else."""
        for rank in range(1, self._world.size):
            with self._locks[rank], suppress(RuntimeError):
                self._tell(rank, _DONE)

    def _range(self, rank: int, number: int, offset: int, length: int) -> memoryview:
        self._world.check()
        data = torch.empty(length, dtype=torch.uint8)
        with self._locks[rank]:
            self._tell(rank, _ASKED, number, offset, length)
            distributed.recv(data, rank, group=self._group)
        view: memoryview = data.numpy().data
        return view

    def _tell(self, rank: int, *words: int) -> None:
        said = torch.zeros(4, dtype=torch.int64)
        said[: len(words)] = torch.tensor(words)
        distributed.send(said, rank, group=self._group)


def serve(memories: Sequence[torch.Tensor], group: Any) -> None:
    """Give rank 0 the ranges of ``memories`` that it asks for, until it needs no more."""
    said = torch.zeros(4, dtype=torch.int64)
    while True:
        distributed.recv(said, 0, group=group)
        word, number, offset, length = said.tolist()
        if word == _DONE:
            return
        part = memories[number][offset : offset + length].cpu().contiguous()
        distributed.send(part, 0, group=group)


def files_of(
    places: Sequence[Place], own: Sequence[torch.Tensor], rank: int, remote: Remote | None
) -> list[Made]:
    """The file of each place: memory of this process, or of one that ``remote`` asks."""
    found = []
    for place in places:
        if place.rank == rank:
            found.append(_memory(place, own[place.number]))
        elif remote is not None:
            found.append(remote.file(place))
        else:
            found.append(in_memory(place.key, place.size, _elsewhere))
    return found


@contextmanager
def remote_memory(world: World, own: Sequence[torch.Tensor]) -> Iterator[Remote | None]:
    """On rank 0, a way to ask the others; on them, the block is for nothing and they serve.

    Called by all ranks. The others are done when the block of rank 0 has ended, well or not.
    """
    if world.size == 1:
        yield None
        return
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        if world.rank:
            serve(own, group)
            yield None
            return
        remote = Remote(world, group)
        try:
            yield remote
        finally:
            remote.end()
    finally:
        distributed.destroy_process_group(group)


def _memory(place: Place, held: torch.Tensor) -> Made:
    def make(offset: int, size: int) -> memoryview:
        view: memoryview = held[offset : offset + size].cpu().numpy().data
        return view

    return in_memory(place.key, place.size, make)


def _elsewhere(offset: int, size: int) -> bytes:
    raise StorageError("this memory is of another rank, which nobody can ask now.")
