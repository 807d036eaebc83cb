"""Stands in for ``nemo.lightning``, as far as it reads and writes checkpoints.

Nothing of NeMo, Lightning or Megatron need be installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bioinit.compat._later import later
from bioinit.compat.nemo import io

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
    from bioinit.compat.nemo.io.pl import TrainerContext
    from bioinit.compat.nemo.restore import RestoreConfig
    from bioinit.compat.nemo.resume import AutoResume

__all__ = [
    "AdapterPath",
    "AutoResume",
    "ConnectorMixin",
    "RestoreConfig",
    "TrainerContext",
    "ckpt_to_context_subdir",
    "ckpt_to_dir",
    "ckpt_to_weights_subdir",
    "idempotent_path_append",
    "io",
    "is_distributed_ckpt",
]

__getattr__, __dir__ = later(
    __name__,
    {
        ".app_state": "",
        ".caches": "",
        ".ckpt_utils": "AdapterPath ckpt_to_context_subdir ckpt_to_dir ckpt_to_weights_subdir "
        "idempotent_path_append is_distributed_ckpt",
        ".io.connector": "ConnectorMixin",
        ".io.pl": "TrainerContext",
        ".llm": "",
        ".restore": "RestoreConfig",
        ".resume": "AutoResume",
    },
)
