"""Configs of Megatron models: stands in for ``bionemo.llm.model.config``.

Where megatron-core is installed, the classes here are subclasses of its ``TransformerConfig``, so
its models take them. It is imported with this module and not with the package: ``import
bioinit.compat.bionemo`` takes as long without it as with it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bioinit.compat.bionemo import settings, weight_utils
from bioinit.compat.bionemo.abstract import BionemoModelConfig, BionemoTrainableModelConfig
from bioinit.compat.bionemo.iomixin_utils import WillHaveGetSetHparam
from bioinit.compat.bionemo.overrides import OF_EVERY_MODEL

if TYPE_CHECKING:
    from bioinit.compat.bionemo.transformer_config import StandIn as TransformerConfig
else:
    from bioinit.compat.bionemo.transformer_config import find

    TransformerConfig = find()

MegatronModelType = TypeVar("MegatronModelType")
"""Any class of model that takes a config of Megatron."""

MegatronLossType = TypeVar("MegatronLossType")
"""Any class of loss."""


class MegatronBioNeMoModelConfig(
    BionemoModelConfig[MegatronModelType],  # type: ignore[type-var]
    TransformerConfig,
    WillHaveGetSetHparam,
):
    """A config for a model of Megatron, which a leaf class makes savable.

    Stands in for ``bionemo.llm.model.config.MegatronBioNeMoModelConfig``.
    """

    model_cls: type[MegatronModelType]

    def __post_init__(self) -> None:
        with warnings.catch_warnings():
            # Megatron-core 0.16 says so of the default of cuda_graph_scope, whoever makes a config.
            warnings.filterwarnings("ignore", "full scope is deprecated", UserWarning)
            super().__post_init__()


@dataclass
class MegatronBioNeMoTrainableModelConfig(
    MegatronBioNeMoModelConfig[MegatronModelType],
    BionemoTrainableModelConfig[MegatronModelType, MegatronLossType],  # type: ignore[type-var]
    Generic[MegatronModelType, MegatronLossType],
):
    """The same for a model that is trained, and may start from a checkpoint.

    Stands in for ``bionemo.llm.model.config.MegatronBioNeMoTrainableModelConfig``. Each instance
    has a list of its own in ``override_parent_fields``.
    """

    initial_ckpt_path: str | None = None
    initial_ckpt_skip_keys_with_these_prefixes: list[str] = field(default_factory=list)
    override_parent_fields: list[str] = field(default_factory=lambda: list(OF_EVERY_MODEL))

    def load_settings_from_checkpoint(self, initial_ckpt_path: str) -> None:
        """Take over the settings that a checkpoint was saved with.

        See :func:`bioinit.compat.bionemo.load_settings_from_checkpoint`.
        """
        settings.load_settings_from_checkpoint(self, initial_ckpt_path)

    def update_model_from_checkpoint(self, model: Any, initial_ckpt_path: str) -> None:
        """Load a checkpoint's weights into ``model``, in place.

        See :func:`bioinit.compat.bionemo.update_model_from_checkpoint`.
        """
        weight_utils.update_model_from_checkpoint(self, model, initial_ckpt_path)
