"""Stands in for ``nemo.lightning.io.mixin``: objects that are kept, and how they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bioinit.compat._capture import IOMixin, track_io
from bioinit.compat._saved import Artifact, drop_unexpected_params, load
from bioinit.compat.nemo._later import found_later

if TYPE_CHECKING:
    from bioinit.compat.nemo.io.connector import ConnectorMixin, ModelConnector

__all__ = [
    "Artifact",
    "ConnectorMixin",
    "IOMixin",
    "ModelConnector",
    "drop_unexpected_params",
    "load",
    "track_io",
]
_CONNECTOR = "bioinit.compat.nemo.io.connector"


def __getattr__(name: str) -> Any:
    return found_later(
        __name__, name, dict.fromkeys(("ConnectorMixin", "ModelConnector"), _CONNECTOR)
    )
