"""Stands in for ``nemo.lightning.io``: objects on disk, connectors, transforms of states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bioinit.compat._capture import IOMixin, IOProtocol, make_known, reinit, track_io
from bioinit.compat._later import later
from bioinit.compat._saved import drop_unexpected_params, is_known, load, load_context
from bioinit.compat.nemo.io.pl import TrainerContext

if TYPE_CHECKING:
    from bioinit.compat.nemo.ckpt_utils import is_distributed_ckpt
    from bioinit.compat.nemo.io.connector import (
        Connector,
        ConnectorMixin,
        ModelConnector,
        export_ckpt,
        import_ckpt,
        model_exporter,
        model_importer,
    )
    from bioinit.compat.nemo.io.state import (
        StateDictTransform,
        TransformCTX,
        TransformFns,
        apply_transforms,
        state_transform,
    )

__all__ = [
    "Connector",
    "ConnectorMixin",
    "IOMixin",
    "IOProtocol",
    "ModelConnector",
    "StateDictTransform",
    "TrainerContext",
    "TransformCTX",
    "TransformFns",
    "apply_transforms",
    "drop_unexpected_params",
    "export_ckpt",
    "import_ckpt",
    "is_distributed_ckpt",
    "is_known",
    "load",
    "load_context",
    "make_known",
    "model_exporter",
    "model_importer",
    "reinit",
    "state_transform",
    "track_io",
]

__getattr__, __dir__ = later(
    __name__,
    {
        ".api": "",
        ".artifact": "",
        ".capture": "",
        ".connector": "Connector ConnectorMixin ModelConnector export_ckpt import_ckpt "
        "model_exporter model_importer",
        ".mixin": "",
        ".pl": "",
        ".state": "StateDictTransform TransformCTX TransformFns apply_transforms state_transform",
        "bioinit.compat.nemo.ckpt_utils": "is_distributed_ckpt",
    },
)
