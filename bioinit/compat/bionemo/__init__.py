"""BioNeMo 2's way to start a model, under the names that people's scripts import.

Stands in for ``bionemo.core.model.config``, ``bionemo.llm.model.config``,
``bionemo.llm.utils.iomixin_utils``, ``bionemo.llm.utils.weight_utils`` and the lists of
``bionemo.llm.model.biobert.model``, which are here too, so that an import need only get
``bioinit.compat.`` in front. Everything is here under its own name as well; the methods
``load_settings_from_checkpoint`` and ``update_model_from_checkpoint`` are functions too, with the
config first. A name is imported when it is asked for, megatron-core with the two classes that
inherit from its ``TransformerConfig``, if it is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bioinit.compat._later import later

if TYPE_CHECKING:
    from bioinit.compat.bionemo.abstract import BionemoModelConfig, BionemoTrainableModelConfig
    from bioinit.compat.bionemo.config import (
        MegatronBioNeMoModelConfig,
        MegatronBioNeMoTrainableModelConfig,
    )
    from bioinit.compat.bionemo.iomixin_utils import (
        IOMixinWithGettersSetters,
        WillHaveGetSetHparam,
    )
    from bioinit.compat.bionemo.overrides import (
        OVERRIDE_BIOBERT_CONFIG_DEFAULTS,
        OVERRIDE_BIONEMO_CONFIG_DEFAULTS,
    )
    from bioinit.compat.bionemo.settings import (
        IOMixinProto,
        load_settings_from_checkpoint,
        override_mutate_possibly_extra_mutated_fiddle,
    )
    from bioinit.compat.bionemo.weight_utils import (
        load_weights_sharded_inplace_nemo2_to_mcore,
        nemo1_to_nemo2_biobert_key_mapping,
        update_model_from_checkpoint,
    )

__all__ = [
    "OVERRIDE_BIOBERT_CONFIG_DEFAULTS",
    "OVERRIDE_BIONEMO_CONFIG_DEFAULTS",
    "BionemoModelConfig",
    "BionemoTrainableModelConfig",
    "IOMixinProto",
    "IOMixinWithGettersSetters",
    "MegatronBioNeMoModelConfig",
    "MegatronBioNeMoTrainableModelConfig",
    "WillHaveGetSetHparam",
    "load_settings_from_checkpoint",
    "load_weights_sharded_inplace_nemo2_to_mcore",
    "nemo1_to_nemo2_biobert_key_mapping",
    "override_mutate_possibly_extra_mutated_fiddle",
    "update_model_from_checkpoint",
]

__getattr__, __dir__ = later(
    __name__,
    {
        ".abstract": "BionemoModelConfig BionemoTrainableModelConfig LossType Model ModelOutput "
        "ModelType",
        ".config": "MegatronBioNeMoModelConfig MegatronBioNeMoTrainableModelConfig",
        ".iomixin_utils": "IOMixinWithGettersSetters WillHaveGetSetHparam",
        ".overrides": "OVERRIDE_BIOBERT_CONFIG_DEFAULTS OVERRIDE_BIONEMO_CONFIG_DEFAULTS "
        "_OVERRIDE_BIOBERT_CONFIG_DEFAULTS _OVERRIDE_BIONEMO_CONFIG_DEFAULTS",
        ".settings": "IOMixinProto load_settings_from_checkpoint "
        "override_mutate_possibly_extra_mutated_fiddle",
        ".weight_utils": "load_weights_sharded_inplace_nemo2_to_mcore "
        "nemo1_to_nemo2_biobert_key_mapping update_model_from_checkpoint",
    },
)
