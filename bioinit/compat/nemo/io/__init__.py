"""Stands in for ``nemo.lightning.io``: objects on disk, connectors, transforms of states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bioinit.compat._capture import IOMixin, IOProtocol, make_known, reinit, track_io
from bioinit.compat._saved import drop_unexpected_params, is_known, load, load_context
from bioinit.compat.nemo._later import found_later
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

_HERE = "bioinit.compat.nemo.io"
_HOMES = {
    "is_distributed_ckpt": "bioinit.compat.nemo.ckpt_utils",
    **{
        name: f"{_HERE}.connector"
        for name in (
            "Connector",
            "ConnectorMixin",
            "ModelConnector",
            "export_ckpt",
            "import_ckpt",
            "model_exporter",
            "model_importer",
        )
    },
    **{
        name: f"{_HERE}.state"
        for name in (
            "StateDictTransform",
            "TransformCTX",
            "TransformFns",
            "apply_transforms",
            "state_transform",
        )
    },
    **{
        name: f"{_HERE}.{name}"
        for name in ("api", "artifact", "capture", "connector", "mixin", "pl", "state")
    },
}


def __getattr__(name: str) -> Any:
    return found_later(__name__, name, _HOMES)
