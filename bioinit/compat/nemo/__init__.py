"""Stands in for ``nemo.lightning``, as far as it reads and writes checkpoints.

Nothing of NeMo, Lightning or Megatron need be installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bioinit.compat.nemo import io
from bioinit.compat.nemo._later import found_later

if TYPE_CHECKING:
    from bioinit.compat.nemo.ckpt_utils import (
        AdapterPath,
        ckpt_to_context_subdir,
        ckpt_to_dir,
        ckpt_to_weights_subdir,
        idempotent_path_append,
        is_distributed_ckpt,
    )
    from bioinit.compat.nemo.io.connector import ConnectorMixin
    from bioinit.compat.nemo.restore import RestoreConfig
    from bioinit.compat.nemo.resume import AutoResume

__all__ = [
    "AdapterPath",
    "AutoResume",
    "ConnectorMixin",
    "RestoreConfig",
    "ckpt_to_context_subdir",
    "ckpt_to_dir",
    "ckpt_to_weights_subdir",
    "idempotent_path_append",
    "io",
    "is_distributed_ckpt",
]

_HERE = "bioinit.compat.nemo"
_HOMES = {
    **{
        name: f"{_HERE}.ckpt_utils"
        for name in (
            "AdapterPath",
            "ckpt_to_context_subdir",
            "ckpt_to_dir",
            "ckpt_to_weights_subdir",
            "idempotent_path_append",
            "is_distributed_ckpt",
        )
    },
    "AutoResume": f"{_HERE}.resume",
    "ConnectorMixin": f"{_HERE}.io.connector",
    "RestoreConfig": f"{_HERE}.restore",
    **{
        name: f"{_HERE}.{name}"
        for name in ("app_state", "caches", "ckpt_utils", "llm", "restore", "resume")
    },
}


def __getattr__(name: str) -> Any:
    return found_later(__name__, name, _HOMES)
