"""Stands in for ``bionemo.core.model.config``: the names that people import from there."""

from __future__ import annotations

from bioinit.compat.bionemo.abstract import (
    BionemoModelConfig,
    BionemoTrainableModelConfig,
    LossType,
    Model,
    ModelOutput,
    ModelType,
)

__all__ = [
    "BionemoModelConfig",
    "BionemoTrainableModelConfig",
    "LossType",
    "Model",
    "ModelOutput",
    "ModelType",
]
