"""From the name of a checkpoint to its folders: stands in for ``nemo.lightning.ckpt_utils``.

A NeMo 2 checkpoint is a folder with ``weights`` and ``context`` in it. Lightning calls it by the
name of a file, ``<folder>.ckpt``. These functions only join names, so they take a ``msc://``
address without its library; ``ckpt_to_weights_subdir`` looks at the disk unless it saves.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bioinit.compat.nemo._paths import AdapterPath, as_path
from bioinit.errors import ConfigError

__all__ = [
    "AdapterPath",
    "ckpt_to_context_subdir",
    "ckpt_to_dir",
    "ckpt_to_weights_subdir",
    "idempotent_path_append",
    "is_distributed_ckpt",
    "preprocess_common_state_dict_before_consistency_check",
]

WEIGHTS_PATH: str = "weights"
CONTEXT_PATH: str = "context"
ADAPTER_META_FILENAME = "adapter_metadata.json"
HF_WEIGHTS_PATH: str = "hf_weights"
HF_ADAPTER_PATH: str = "hf_adapter"
HF_ADAPTER_CONFIG_FILENAME = "adapter_config.json"


class NoName(ConfigError, ValueError):
    """A checkpoint was asked for at a path that ends in no name."""


def idempotent_path_append(base_dir: str | os.PathLike[str], suffix: str) -> Path:
    """``base_dir/suffix``; ``base_dir`` itself if it ends in ``suffix`` already.

    Stands in for the function of that name. Of an :class:`AdapterPath` the model's path gets it
    too. There, the newest release forgets that path, and older ones changed the one passed in; here
    a new path comes back.
    """
    path = as_path(base_dir, only_the_name=True)
    if path.name != suffix:
        path = path / suffix
    if isinstance(path, AdapterPath):
        base = path.base_model_path
        if base is not None and base.name != suffix:
            path = path.with_base(base / suffix)
    return _as_declared(path)


def ckpt_to_dir(filepath: str | os.PathLike[str]) -> Path:
    """The folder that Lightning means by ``filepath``: without ``.ckpt`` at its end.

    Stands in for ``nemo.lightning.ckpt_utils.ckpt_to_dir``. Other dots belong to the name:
    ``step=1-loss=0.5`` stays as it is.

    Raises:
        NoName: the path ends in no name (``/``, ``.``). It is a ``ValueError``, as there.
    """
    path = as_path(filepath, only_the_name=True)
    if isinstance(path, AdapterPath):
        return path
    if not path.name:
        raise NoName(f"{str(filepath)!r} names no checkpoint: it ends in no name. Give its folder.")
    return _as_declared(path.with_suffix("") if path.suffix == ".ckpt" else path)


def ckpt_to_context_subdir(filepath: str | os.PathLike[str]) -> Path:
    """The folder of the saved settings: ``<folder>/context``.

    Stands in for ``nemo.lightning.ckpt_utils.ckpt_to_context_subdir``.
    """
    return idempotent_path_append(ckpt_to_dir(filepath), CONTEXT_PATH)


def ckpt_to_weights_subdir(filepath: str | os.PathLike[str], is_saving: bool) -> Path:
    """The folder of the weights: ``<folder>/weights``, if it is there or will be.

    Stands in for ``nemo.lightning.io.pl.ckpt_to_weights_subdir``. Older checkpoints keep their
    weights in the folder itself; so unless ``is_saving``, that one comes back where ``weights`` is
    no folder. Of an :class:`AdapterPath` the model's path is treated alike.
    """
    path = _weights_in(ckpt_to_dir(filepath), is_saving)
    if isinstance(path, AdapterPath) and path.base_model_path is not None:
        path = path.with_base(_weights_in(path.base_model_path, is_saving))
    return _as_declared(path)


def is_distributed_ckpt(path: str | os.PathLike[str]) -> bool:
    """Whether a distributed checkpoint lies at ``path``: a folder with ``metadata.json``.

    Stands in for ``nemo.lightning.io.is_distributed_ckpt``. As there, one whose writer was stopped
    early has no such file and counts as none.
    """
    folder = as_path(ckpt_to_dir(path))
    return bool(folder.is_dir() and (folder / "metadata.json").is_file())


def preprocess_common_state_dict_before_consistency_check(
    state_dict: Mapping[str, Any],
) -> dict[str, Any]:
    """A copy of ``state_dict`` without what differs from rank to rank: the ``Timer`` callback.

    Stands in for the function of that name, which some releases had in
    ``nemo.lightning.ckpt_utils``.
    """
    copied = copy.deepcopy(dict(state_dict))
    callbacks = copied.get("callbacks")
    if isinstance(callbacks, dict):
        callbacks.pop("Timer", None)
    return copied


def _weights_in(folder: Any, is_saving: bool) -> Any:
    if folder.name == WEIGHTS_PATH:
        return folder
    inner = folder / WEIGHTS_PATH
    return inner if is_saving or as_path(str(inner)).is_dir() else folder


def _as_declared(path: Any) -> Path:
    """A path of ``multistorageclient`` is none of pathlib's, but is used like one."""
    declared: Path = path
    return declared
