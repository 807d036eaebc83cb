"""Who we are, and the store at which all ranks met: torch.distributed's, or its launcher's words.

The one place that touches torch.distributed's own bookkeeping.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch

from bioinit.errors import ConfigError
from bioinit.ranks.store import Store

MEET_SECONDS = 600.0
"""How long the first rank waits for the last one to be started."""

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH = (
    "Start all ranks with `torchrun --nproc-per-node N -m bioinit ...`, or let the launcher's "
    "script export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
)


class Met(NamedTuple):
    """This rank among the others. ``store`` is None where the others are only imagined."""

    store: Store | None
    rank: int
    size: int


def meet(device: str | None) -> Met:
    """This rank, after all have met; a size of 1 where there is nobody to meet.

    Raises:
        ConfigError: the launcher's variables are incomplete, or the others did not come.
    """
    if not torch.distributed.is_available():
        if _launched_size() > 1:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this build of torch has no "
                "torch.distributed. Install one that has, or unset WORLD_SIZE to start alone."
            )
        return Met(None, 0, 1)
    from torch import distributed

    if not distributed.is_initialized():
        if _launched_size() == 1:
            return Met(None, 0, 1)
        _join_the_others(device)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if size == 1 or distributed.get_backend() == "fake":
        return Met(None, rank, size)
    store = distributed.distributed_c10d._get_default_store()
    require_server(store)
    return Met(cast(Store, store), rank, size)


def require_server(store: Any) -> None:
    """Refuse a file as a store: ranks that ask it while others write to it wait for each other."""
    from torch._C._distributed_c10d import FileStore, PrefixStore

    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, FileStore):
        raise ConfigError(
            "the ranks met in a file (init_method='file://...'), through which they cannot watch "
            "each other. Call init_process_group with init_method='env://' or 'tcp://...', or do "
            "not call it: bioinit does, from the launcher's variables."
        )


def prefixed(store: Store, prefix: str) -> Store:
    """The same store, with keys of its own."""
    from torch.distributed.distributed_c10d import PrefixStore

    make: Any = PrefixStore
    return cast(Store, make(prefix, store))


def started() -> int:
    """How many processes there are beside this one and with it: met, or told of by a launcher."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return _launched_size()


def _launched_size() -> int:
    return _number("WORLD_SIZE") if os.environ.get("WORLD_SIZE") else 1


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise ConfigError(f"{variable} is {text!r} in the environment, not a number. {_LAUNCH}.")
    return int(text)


def _join_the_others(device: str | None) -> None:
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the environment lacks "
            f"{', '.join(missing)}. {_LAUNCH}; or unset WORLD_SIZE to start alone."
        )
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    _number("MASTER_PORT")
    if rank >= size:
        raise ConfigError(
            f"RANK is {rank}, but WORLD_SIZE is {size}: ranks count from 0. {_LAUNCH}."
        )
    kind = torch.device(device or "cpu").type
    if kind == "cuda":
        torch.cuda.set_device(_own_gpu(str(device), rank))
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=_patience())))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"rank {rank} of {size} did not meet the others at {where} within "
            f"{MEET_SECONDS:.0f} s: {str(error).splitlines()[0]} Look whether all {size} were "
            "started and are alive, and whether MASTER_ADDR and MASTER_PORT are the same on all."
        ) from error


def _patience() -> timedelta:
    return timedelta(seconds=MEET_SECONDS)


def _own_gpu(device: str, rank: int) -> int:
    """The GPU of this rank: the one that is named, or the one of its number on this host."""
    named = torch.device(device).index
    if named is not None:
        return named
    count = torch.cuda.device_count()
    local = _number("LOCAL_RANK") if os.environ.get("LOCAL_RANK") else rank % max(1, count)
    if local >= count:
        raise ConfigError(
            f"LOCAL_RANK is {local}, but this host shows {count} GPUs (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')!r}). Start at most one rank for "
            "each GPU, or set placement.device=cpu."
        )
    return local


def part() -> None:
    """Leave the process group, if there is one, as whoever made it should at its end."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
