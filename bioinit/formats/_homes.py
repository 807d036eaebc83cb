"""From the folder that a person points at to the one in which the weights lie.

Training systems wrap their weights: NeMo 2 keeps them in ``weights/`` beside ``context/``, NeMo 1
in ``model_weights/``; Megatron, DeepSpeed and GPT-NeoX write one folder per saved step and a small
file that names the latest. Every folder on the way is a *home*: a saved config may lie in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from bioinit.errors import AmbiguousFormat, CorruptCheckpoint, UnfinishedCheckpoint
from bioinit.formats import _directory
from bioinit.storage import Folder

MEGATRON_POINTER = "latest_checkpointed_iteration.txt"
DEEPSPEED_POINTER = "latest"
WRAPPED = ("weights", "model_weights")
"""What NeMo 2 and NeMo 1 call the folder of weights."""

BESIDE_OPTIMIZERS = ("model", "pytorch_model_fsdp_0")
"""What NeMo Automodel and Accelerate call it. Others use such a name for other things."""

_NEMO_1, _NEMO_1_WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_STEP = re.compile(r"iter_\d+|global_step\d+|release")
_RANK = re.compile(r"(mp|tp)_rank_\d+(_.+)?")
_UNFINISHED = "-unfinished"
LONGEST_POINTER = 4096
DEEPEST = 8


Fits = Callable[[Folder], bool]
"""Whether a format recognizes a folder."""


def homes(folder: Folder, fits: Fits) -> tuple[Folder, ...]:
    """The folders of one checkpoint, that of its weights first, the one pointed at last.

    A folder above it that belongs to it, of NeMo 2's ``weights/`` for example, comes after that.

    Raises:
        UnfinishedCheckpoint: a marker says that one of them was still being written.
        CorruptCheckpoint: a pointer names a folder that is not there.
        AmbiguousFormat: there are several steps and nothing says which is meant.
    """
    if folder.is_file:
        return (folder,) if folder.around is None else (folder.around,)
    way = [whole(folder)]
    while len(way) < DEEPEST and (inner := _step(way[-1], fits)) is not None:
        way.append(inner)
    above, name = way[0].parent, way[0].path.name
    if above is not None and (name in WRAPPED or _STEP.fullmatch(name)):
        way.insert(0, above)
    for home in way:
        if home.has_sibling(home.path.name + _UNFINISHED):
            raise UnfinishedCheckpoint(
                f"{home.path} was never finished: its writer left {home.path.name}{_UNFINISHED} "
                "beside it, which it removes when it is done. Use an earlier checkpoint, or, if "
                "you know that this one is whole, remove that marker."
            )
    return tuple(reversed(way))


def whole(folder: Folder) -> Folder:
    """The folder of all ranks, for that of one rank, which holds a part of every tensor."""
    above = folder.parent
    return above if above is not None and _RANK.fullmatch(folder.path.name) else folder


def _step(folder: Folder, fits: Fits) -> Folder | None:
    """The folder inside ``folder`` that holds its weights, or None if they are not further in."""
    inner = folder.folders()
    has_weights = _directory.has_weights(folder)
    for name in WRAPPED:
        if name in inner and _holds(folder.folder(name), fits):
            # In a tree of NeMo 1 a .pt beside the weights is an artifact.
            is_nemo = folder.has(_NEMO_1) and not folder.has(_NEMO_1_WEIGHTS)
            if has_weights and not is_nemo:
                raise AmbiguousFormat(
                    f"{folder.path} holds weights, and the folder {name}/ in it does so too. Point "
                    "at the file or folder that is meant."
                )
            return folder.folder(name)
    if not has_weights and not fits(folder):
        for name in BESIDE_OPTIMIZERS:
            if name in inner and fits(folder.folder(name)):
                return folder.folder(name)
    if folder.has(MEGATRON_POINTER):  # what Megatron leaves beside its steps are never weights
        said = _pointed(folder, MEGATRON_POINTER)
        name = f"iter_{int(said):07d}" if re.fullmatch(r"\d{1,18}", said) else said
        return _named(folder, MEGATRON_POINTER, name)
    if has_weights:  # gathered beside the steps they come from, as transformers' Trainer does
        return None
    if folder.has(DEEPSPEED_POINTER):
        return _named(folder, DEEPSPEED_POINTER, _pointed(folder, DEEPSPEED_POINTER))
    steps = [name for name in inner if _STEP.fullmatch(name)]
    if not steps or fits(folder):
        return None
    if len(steps) > 1:
        raise AmbiguousFormat(
            f"{folder.path} holds {len(steps)} saved steps, {steps[0]} to {steps[-1]}, and neither "
            f"{MEGATRON_POINTER} nor {DEEPSPEED_POINTER} says which is the latest. Point at the "
            "one that is meant."
        )
    return folder.folder(steps[0])


def _holds(folder: Folder, fits: Fits) -> bool:
    """Whether weights lie in ``folder``."""
    return fits(folder) or _directory.has_weights(folder)


def _pointed(folder: Folder, pointer: str) -> str:
    file = folder.file(pointer)
    if file.size > LONGEST_POINTER:
        raise CorruptCheckpoint(
            f"{file} has {file.size} bytes, but should hold the name of a saved step. Point at the "
            "folder of the step itself."
        )
    return folder.read_text(pointer).strip()


def _named(folder: Folder, pointer: str, name: str) -> Folder:
    if not name:
        raise CorruptCheckpoint(
            f"{folder.file(pointer)} is empty, and should name the latest step: its writer was "
            "stopped. Point at the step that is meant."
        )
    folder.require_inside(name)
    if name not in folder.folders():
        there = ", ".join(folder.folders()[:8]) or "no folder"
        raise CorruptCheckpoint(
            f"{folder.file(pointer)} says that the latest step is {name!r:.100}, but {folder.path} "
            f"has {there}. Fetch that step too, or point at the one that is meant."
        )
    return folder.folder(name)
