"""Stands in for ``nemo.lightning.io.api``: contexts and connectors by function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bioinit.compat._later import later
from bioinit.compat._saved import load, load_context
from bioinit.compat.nemo.io.pl import TrainerContext

if TYPE_CHECKING:
    from bioinit.compat.nemo.io.connector import (
        export_ckpt,
        import_ckpt,
        load_connector_from_trainer_ckpt,
        model_exporter,
        model_importer,
    )

__all__ = [
    "TrainerContext",
    "export_ckpt",
    "import_ckpt",
    "load",
    "load_connector_from_trainer_ckpt",
    "load_context",
    "model_exporter",
    "model_importer",
]

__getattr__, __dir__ = later(
    __name__,
    {
        "bioinit.compat.nemo.io.connector": "export_ckpt import_ckpt "
        "load_connector_from_trainer_ckpt model_exporter model_importer"
    },
)
