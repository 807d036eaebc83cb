"""Writing by all ranks at once: each stores the boxes that lie in its own memory.

What a plan copies out of memory of this rank becomes chunks of torch's distributed checkpoint, as
they lie in the tensors of the dialect, so nothing crosses the network and no box is described but
by its own offsets and sizes. Every rank knows every other's chunks from the plan; the first one
writes the index.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch

from bioinit.formats.protocol import Outgoing, WriteOptions
from bioinit.formats.torch_dist import parts
from bioinit.layout import Dims, Overlap, numel
from bioinit.load.stream import Stream
from bioinit.plan import Copy, LoadPlan, TargetPlan
from bioinit.ranks import World
from bioinit.save.rectangles import missing, rectangles
from bioinit.save.remote import files_of
from bioinit.save.shares import Shares
from bioinit.storage import Journal

_WORK = ".rank-{}"
_EMPTY = Overlap((), 0, (), 0, ())


def write_own_share(
    plan: LoadPlan,
    shares: Shares,
    own: Sequence[torch.Tensor],
    folder: Path,
    spelled: Callable[[str], str],
    options: WriteOptions,
    world: World,
) -> Collection[str]:
    """Write what of ``plan`` lies on this rank into ``folder``; on rank 0, the index too.

    Called by all ranks, with the same plan and shares.

    Args:
        plan: the tensors to write, whole, out of ``shares``.
        shares: where everything lies.
        own: the memory of this rank.
        folder: one folder for all ranks.
        spelled: what a key is called outside.
        options: what is stored beside the tensors.
        world: the ranks.

    Returns:
        The names of the files that this rank has written.

    Raises:
        StorageError: the file system refused, here or on another rank.
    """
    laid = _Laid(plan, [place.rank for place in shares.places])
    work = folder / _WORK.format(world.rank)
    work.mkdir()
    stream = Stream(laid.plan_of(world.rank), files_of(shares.places, own, world.rank, None), {})
    fills = {outgoing.key: outgoing.fill for outgoing in stream.outgoing()}

    def filling(name: str) -> Callable[[int, torch.Tensor], None]:
        fill = fills[name]

        def checked(first: int, memory: torch.Tensor) -> None:
            world.check()
            fill(first, memory)

        return checked

    objects = options.objects if not world.rank else {}
    mine = [chunk for chunk in laid.chunks(spelled, filling, world.rank)]
    with Journal(work, "") as journal:
        parts.write_chunks(folder, mine, journal, rank=world.rank, objects=objects)
        files = tuple(journal.notes)
    world.gathered(None)  # all of it is there
    if world.rank:
        return files
    notes = []
    for rank in range(world.size):
        with Journal(folder / _WORK.format(rank), "") as journal:
            notes.append(dict(journal.notes))
        shutil.rmtree(folder / _WORK.format(rank))
    tensors = [
        Outgoing(spelled(key), planned.claim.shape, planned.dtype, _never)
        for key, planned in plan.targets.items()
    ]
    parts.finish(folder, tensors, laid.chunks(spelled, lambda name: _never), notes, options)
    return files


class _Laid:
    """A plan as boxes: whose each is, and where its elements come from."""

    def __init__(self, plan: LoadPlan, ranks: Sequence[int]) -> None:
        self._plan = plan
        self._boxes: list[tuple[int, str, Dims, TargetPlan]] = []
        for key, planned in plan.targets.items():
            self._boxes.extend((rank, key, at, each) for rank, at, each in _boxes(planned, ranks))

    def plan_of(self, rank: int) -> LoadPlan:
        """A plan whose targets are the boxes of ``rank``."""
        held = {
            str(number): planned
            for number, (owner, _, _, planned) in enumerate(self._boxes)
            if owner == rank
        }
        return dataclasses.replace(self._plan, targets=held)

    def chunks(
        self,
        spelled: Callable[[str], str],
        filling: Callable[[str], Callable[[int, torch.Tensor], None]],
        rank: int | None = None,
    ) -> Iterator[parts.Chunk]:
        """The chunks of ``rank``, or of all."""
        for number, (owner, key, offsets, planned) in enumerate(self._boxes):
            if rank is None or owner == rank:
                whole = self._plan.targets[key].claim.shape
                name, shape = spelled(key), planned.claim.shape
                fill = filling(str(number))
                tensor = Outgoing(name, whole, planned.dtype, fill)
                for chunk in parts.chunks_of(Outgoing(name, shape, planned.dtype, fill)):
                    at = tuple(map(int.__add__, offsets, chunk.offsets))
                    yield chunk._replace(tensor=tensor, offsets=at)


def _boxes(planned: TargetPlan, ranks: Sequence[int]) -> Iterator[tuple[int, Dims, TargetPlan]]:
    """The boxes that ``planned`` consists of, each as a target of its own."""
    shape = planned.claim.shape
    held: list[tuple[Dims, Dims]] = []
    for copy in planned.copies:
        for box in rectangles(shape, copy.overlap):
            held.append(box[:2])
            yield ranks[copy.file], box.offsets, _one(planned, box.sizes, copy, box.overlap)
    if planned.padded or not numel(shape):
        nothing = [((0,) * len(shape), shape)] if not numel(shape) else missing(shape, held)
        for offsets, sizes in nothing:
            yield 0, offsets, _one(planned, sizes, None, _EMPTY)


def _one(planned: TargetPlan, sizes: Dims, copy: Copy | None, overlap: Overlap) -> TargetPlan:
    return planned._replace(
        claim=planned.claim._replace(shape=sizes),
        copies=() if copy is None else (copy._replace(overlap=overlap),),
        equal=(),
        padded=copy is None,
    )


def _never(first: int, memory: torch.Tensor) -> None:
    raise AssertionError("only its place is asked for")
