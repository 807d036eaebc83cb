"""Stands in for ``nemo.lightning.io.mixin``: objects that are kept, and how they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bioinit.compat._capture import IOMixin, track_io
from bioinit.compat._later import later
from bioinit.compat._saved import Artifact, drop_unexpected_params, load

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

__getattr__, __dir__ = later(
    __name__, {"bioinit.compat.nemo.io.connector": "ConnectorMixin ModelConnector"}
)
