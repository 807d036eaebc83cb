"""Stands in for ``bionemo.llm.utils.weight_utils``: the names that people import from there."""

from __future__ import annotations

from bioinit.compat.bionemo.weight_utils import (
    load_weights_sharded_inplace_nemo2_to_mcore,
    nemo1_to_nemo2_biobert_key_mapping,
)

__all__ = [
    "load_weights_sharded_inplace_nemo2_to_mcore",
    "nemo1_to_nemo2_biobert_key_mapping",
]
