"""Stands in for ``bionemo.llm.model.biobert.model``, as far as its lists are concerned."""

from __future__ import annotations

from bioinit.compat.bionemo.overrides import (
    _OVERRIDE_BIOBERT_CONFIG_DEFAULTS,
    OVERRIDE_BIOBERT_CONFIG_DEFAULTS,
)

__all__ = [
    "OVERRIDE_BIOBERT_CONFIG_DEFAULTS",
    "_OVERRIDE_BIOBERT_CONFIG_DEFAULTS",
]
