"""Which of the checkpoints that a run left is the one to go on with.

NeMo writes each into a folder of its own. The name of the newest ends in ``last``, that of one
written when the run had come to its end in ``end``; while one is being written a file
``<name>-unfinished`` stands beside it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from bioinit.errors import ConfigError, StorageError, UnfinishedCheckpoint

_log = logging.getLogger("bioinit")
UNFINISHED = "-unfinished"
_OF_ONE_RANK = ("mp_rank", "tp_rank", "fsdp_shard")


class NotFoundError(StorageError, FileNotFoundError):
    """There is no checkpoint to resume from.

    Stands in for ``nemo.utils.exp_manager.NotFoundError``. Here it is a ``FileNotFoundError`` too.
    """


class Unfinished(UnfinishedCheckpoint, ValueError):
    """All that a run could go on with was never finished."""


class AlreadyEnded(ConfigError, ValueError):
    """The run that is to be gone on with has come to its end, or to more than one."""


def newest_checkpoint(folder: Any, *, past_end: bool) -> Any:
    """The folder in ``folder`` to go on with, or None if nothing there can be gone on with.

    Args:
        folder: where the run keeps its checkpoints.
        past_end: go on even with a run that has come to its end.

    Raises:
        Unfinished: there are some, and a marker stands beside each of them.
        AlreadyEnded: the run has come to its end, and ``past_end`` is not set; or there are
            several ends, and nothing says which is meant.
    """
    if not folder.is_dir():
        return None
    there = sorted((path for path in folder.glob("*") if path.is_dir()), key=str)
    ends = _finished([path for path in there if path.name.endswith("end")], "End")
    lasts = _finished([path for path in there if path.name.endswith("last")], "Last")
    if not ends:
        return _newest(lasts)
    if not past_end:
        raise AlreadyEnded(
            f"cannot resume: Found {ends[0]} indicating that the last training run has already "
            "completed. Train on with resume_past_end=True, or give another folder."
        )
    if len(ends) > 1 and not _is_of_one_rank(ends[0]):
        raise AlreadyEnded(
            f"cannot resume: Multiple checkpoints {[str(path) for path in ends]} that matches "
            "*end.ckpt. Give the one that is meant as resume_from_path, or move the others away."
        )
    # One that was gone on with past its end has a newer last beside it.
    return ends[0] if len(ends) > 1 else _newest([*ends, *lasts])


def _finished(found: list[Any], kind: str) -> list[Any]:
    whole = [path for path in found if not is_unfinished(path)]
    if found and not whole:
        raise Unfinished(
            f"{kind} checkpoint is unfinished and cannot be used to resume the training: beside "
            f"{', '.join(map(str, found))} its writer left a marker, *{UNFINISHED}, which it "
            "removes when it is done. Remove the checkpoint and its marker to go on without it; "
            "with the step in the names of checkpoints, an earlier one stays."
        )
    for path in found:
        if path not in whole:
            _log.warning("%s was never finished: its marker is there. It is passed over.", path)
    return whole


def is_unfinished(path: Any) -> bool:
    """Whether the program that wrote ``path`` was stopped before it was done."""
    # A link is as whole as what it leads to.
    places = [path, path.resolve()] if isinstance(path, Path) else [path]
    return any((place.parent / (place.name + UNFINISHED)).exists() for place in places)


def _newest(found: list[Any]) -> Any:
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    if _is_of_one_rank(found[0]):
        return found[0].parent.parent / found[0].name
    chosen = max(found, key=lambda path: (path.lstat().st_mtime, path.name))
    _log.warning(
        "%d checkpoints can be resumed from; %s was written last, and is taken. The others: %s.",
        len(found), chosen, ", ".join(path.name for path in found if path != chosen),
    )  # fmt: skip
    return chosen


def _is_of_one_rank(path: Path) -> bool:
    """Whether it lies in the folder that one rank wrote, beside those of the others."""
    return path.parent.name.startswith(_OF_ONE_RANK)
