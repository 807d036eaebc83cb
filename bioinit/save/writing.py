"""The weights of a model into a folder, by a plan out of the memory of all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from bioinit import formats
from bioinit.errors import Problem
from bioinit.formats.protocol import WriteOptions
from bioinit.load.stream import Stream
from bioinit.plan import LoadPlan
from bioinit.ranks import World
from bioinit.report import raise_for
from bioinit.save.beside import Beside, put
from bioinit.save.own_share import write_own_share
from bioinit.save.remote import files_of, remote_memory
from bioinit.save.shares import Shares, memories, shares_of
from bioinit.storage import Journal
from bioinit.targets import Located

_BY_ALL = "torch_dist"
"""The format that all ranks write at once; any other is written by rank 0."""


@dataclass(frozen=True)
class Decided:
    """Which element goes where.

    ``zeros`` are names that are left out because they must be zero, and what to say if one is not.
    """

    plan: LoadPlan
    zeros: Mapping[str, Problem] = dataclasses.field(default_factory=dict)


class Wording(Protocol):
    """In which names, and with what beside it, a model is written."""

    @property
    def to(self) -> str:
        """The dialect."""

    @property
    def format(self) -> str:
        """How bytes will lie."""

    def decided(self, model: nn.Module, shares: Shares) -> Decided:
        """The plan of the tensors to write, whole, out of ``shares``; the same on every rank."""

    def beside(self, plan: LoadPlan) -> Beside:
        """Everything but weights, context and receipt.

        Raises:
            ConfigError: the dialect cannot express a field of the config.
        """


def write_weights(
    wording: Wording,
    model: nn.Module,
    folder: Path,
    max_bytes: int,
    located: Mapping[str, Located],
    world: World,
) -> tuple[Beside, Collection[str]]:
    """Write the weights of ``model``, and what is made beside them, into ``folder``.

    Called by all ranks of ``world``.

    Returns:
        What lies beside, whose files that are copied are left to who calls; and the names of the
        files of weights that this rank has written, relative to ``folder``.

    Raises:
        PlanError: the model holds what the dialect has no word for.
        ConfigError: the dialect cannot express a field of the config.
        StorageError: the file system refused.
    """
    is_by_all = wording.format == _BY_ALL and world.size > 1
    shares = shares_of(model, located, world, spread=is_by_all)
    decided = wording.decided(model, shares)
    raise_for(decided.plan.problems, "saving has")
    own = memories(model, shares.mine)
    raise_for([*_not_zero(decided, shares, own, world)], "saving has")
    side = wording.beside(decided.plan)
    weights = folder / side.written.weights
    weights.mkdir(parents=True, exist_ok=True)
    options = WriteOptions(
        max_shard_bytes=max_bytes, objects=side.written.objects, common=side.written.common
    )

    def spelled(key: str) -> str:
        return side.written.front + key

    if is_by_all:
        written = write_own_share(decided.plan, shares, own, weights, spelled, options, world)
        names = [(weights / name).relative_to(folder).as_posix() for name in written]
    else:
        names = []
        with remote_memory(world, own) as remote:
            if not world.rank:
                files = files_of(shares.places, own, 0, remote)
                stream = Stream(decided.plan, files, shares.stored)
                write = formats.load(wording.format).write
                assert write is not None  # it was asked for by a name that was checked
                with Journal(folder, "") as journal:
                    write(weights, stream.outgoing(spelled), options, journal)
                (folder / Journal.NAME).unlink()
    if not world.rank:
        put(folder, side.made)
    return side, names


def problems_of(
    wording: Wording, model: nn.Module, located: Mapping[str, Located], world: World
) -> tuple[Problem, ...]:
    """What of ``model``, which may be on meta, cannot be written. Called by all ranks.

    Raises:
        ConfigError: the dialect cannot express a field of the config.
    """
    decided = wording.decided(model, shares_of(model, located, world))
    if not decided.plan.problems:
        wording.beside(decided.plan)
    return decided.plan.problems


def _not_zero(
    decided: Decided, shares: Shares, own: list[torch.Tensor], world: World
) -> Iterator[Problem]:
    """A world without such a tensor means zeros, and only zeros can be left out for it."""
    if not decided.zeros:
        return
    here = sorted(
        {
            place.key
            for place in shares.places
            if place.key in decided.zeros
            and place.rank == world.rank
            # Minus zero is zero, and has a byte that is none.
            and torch.count_nonzero(own[place.number].view(shares.stored[place.key].dtype))
        }
    )
    found = world.united(here, lambda one, other: sorted({*one, *other}))
    yield from (problem for name, problem in decided.zeros.items() if name in found)
