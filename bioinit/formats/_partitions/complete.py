"""Whether a folder holds every partition and every layer, going by all that it says of itself.

Where the last partition of everything is missing, what is left has no gap. Other files still tell:
by their names, as each partition has files of its own for the engine and the optimizer, and by the
settings in them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from bioinit.errors import UnfinishedCheckpoint
from bioinit.formats._partitions.said import size
from bioinit.formats.protocol import StoredTensor
from bioinit.storage import Folder

_ENGINE = re.compile(r"mp_rank_(\d{1,6})_model_states\.pt")
_OPTIMIZER = re.compile(r".*_?mp_rank_(\d{1,6})_optim_states\.pt")
_LEADS_BACK = re.compile(r"(.*\.)?(attention|mixer)\.dense\.weight")


def require_partitions(
    folder: Folder,
    said: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    count: int,
    missing: str,
    *,
    has_stages: bool = False,
) -> None:
    """Raise UnfinishedCheckpoint if there are more partitions than the ``count`` that were found.

    ``said`` is what the engine saved, ``tensors`` those of the first partition, and ``missing`` the
    first file that would be missing. ``has_stages``: the engine may count stages of a pipeline too,
    as DeepSpeed's does: its ranks are then partitions times stages.
    """
    where, cure = folder.path, "Fetch the rest, or point at a complete checkpoint."
    sizes = size(said, "model_parallel_size", "tensor_model_parallel_size")
    if sizes is not None and (has_stages or sizes > count):
        if sizes > count:
            raise UnfinishedCheckpoint(
                f"{where} holds {count} of {sizes} partitions: {missing} and what follows is "
                f"missing, where the saved arguments say that there are {sizes}. {cure}"
            )
        return
    by_name = {int(m[1]): n for n in folder.names() if (m := _numbered(n))}
    ranks, witness = max(by_name, default=-1) + 1, by_name.get(max(by_name, default=-1), "")
    world = said.get("mp_world_size")
    if type(world) is int and world > ranks:
        ranks, witness = world, "mp_world_size in the engine's files"
    if ranks <= count or (has_stages and _are_stages(folder, ranks, count, tensors)):
        return
    raise UnfinishedCheckpoint(
        f"{where} holds {count} of {ranks} partitions: {missing} and what follows is missing, "
        f"where there should be {ranks} going by {witness}. {cure}"
    )


def require_layers(where: str, said: Mapping[str, Any], numbers: Collection[int]) -> None:
    """Raise UnfinishedCheckpoint if fewer layers are there than the saved arguments count.

    ``numbers`` are what the layers are called by in file or tensor names.
    """
    wanted = size(said, "num_layers")
    if wanted is None or not numbers or len(numbers) >= wanted:
        return
    held = sorted(numbers)
    gap = next((low + 1 for low, high in pairwise(held) if high > low + 1), None)
    missing = f"layer {gap} is missing"
    if gap is None:
        missing = f"those there are numbered {held[0]} to {held[-1]}, and the others are missing"
    raise UnfinishedCheckpoint(
        f"{where} holds {len(held)} of {wanted} layers, where the saved arguments say num_layers "
        f"{wanted}: {missing}. Fetch the rest, or point at a complete checkpoint."
    )


def _numbered(name: str) -> re.Match[str] | None:
    return _ENGINE.fullmatch(name) or _OPTIMIZER.fullmatch(name)


def _are_stages(
    folder: Folder, ranks: int, count: int, tensors: Mapping[str, StoredTensor]
) -> bool:
    """Whether ``ranks`` of the engine are ``count`` partitions times stages of a pipeline."""
    engines = {int(m[1]) for name in folder.names() if (m := _ENGINE.fullmatch(name))}
    if ranks % count or len(engines) != ranks or max(engines) >= ranks:
        return False
    shapes: Sequence[Sequence[int]] = [
        tensor.shape
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and _LEADS_BACK.fullmatch(name)
    ]
    # A layer that leads back to the width of the model is square once all its columns are there.
    return all(rows <= columns * count for rows, columns in shapes)
