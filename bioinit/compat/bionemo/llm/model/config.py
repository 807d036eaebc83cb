"""Stands in for ``bionemo.llm.model.config``: the names that people import from there."""

from __future__ import annotations

from bioinit.compat.bionemo.config import (
    MegatronBioNeMoModelConfig,
    MegatronBioNeMoTrainableModelConfig,
)
from bioinit.compat.bionemo.overrides import (
    _OVERRIDE_BIONEMO_CONFIG_DEFAULTS,
    OVERRIDE_BIONEMO_CONFIG_DEFAULTS,
)
from bioinit.compat.bionemo.settings import (
    IOMixinProto,
    override_mutate_possibly_extra_mutated_fiddle,
)

__all__ = [
    "OVERRIDE_BIONEMO_CONFIG_DEFAULTS",
    "_OVERRIDE_BIONEMO_CONFIG_DEFAULTS",
    "IOMixinProto",
    "MegatronBioNeMoModelConfig",
    "MegatronBioNeMoTrainableModelConfig",
    "override_mutate_possibly_extra_mutated_fiddle",
]
