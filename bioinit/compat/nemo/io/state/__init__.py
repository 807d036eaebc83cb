"""State dicts turned into those of another model: stands in for ``nemo.lightning.io.state``.

A mapping renames, a :class:`StateDictTransform` computes. Names are paired by what the wildcards
caught: layer 5 goes to layer 5. The original sorts both sides and pairs the n-th with the n-th;
wherever that would pair other names, there is an error here that says which. On input where both
agree the values are the same.
"""

from bioinit.compat.nemo.io.state.apply import (
    AdditionalKeys,
    ConversionError,
    DifferentShapes,
    NotConverted,
    apply_transforms,
)
from bioinit.compat.nemo.io.state.context import TransformCTX, _ModelState
from bioinit.compat.nemo.io.state.functions import TransformFns
from bioinit.compat.nemo.io.state.pairing import TransformError, UnpairedNames
from bioinit.compat.nemo.io.state.transform import StateDictTransform, state_transform

__all__ = [
    "AdditionalKeys",
    "ConversionError",
    "DifferentShapes",
    "NotConverted",
    "StateDictTransform",
    "TransformCTX",
    "TransformError",
    "TransformFns",
    "UnpairedNames",
    "_ModelState",
    "apply_transforms",
    "state_transform",
]
