"""A module that exists already, and a checkpoint whose names another world spells.

``load_weights`` has no recipe that names a family. For a ``transformers`` model its own config says
what it is, for one of megatron-core the checkpoint's; where the names are spelled as the module has
them, none of this is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from bioinit import families
from bioinit.config import TrainableModelConfig
from bioinit.contexts import Checkpoint
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families.protocol import Family
from bioinit.layout import Dims
from bioinit.mapping import Names
from bioinit.merge import merge
from bioinit.record import build, make_record
from bioinit.sides import NamesOf

_STACKED = re.compile(r"\.layers\.(?!\d)")
_DIALECTS = {"transformers": "hf", "megatron": "megatron"}


def names_across(module: nn.Module, checkpoint: Checkpoint) -> NamesOf | None:
    """What names the stored tensors for ``module``; None where nobody need translate.

    Raises:
        ConfigError: a saved config that is at hand describes another model than its family has.
    """
    builder = _builder_of(module)
    if builder is None:
        return None
    own = _own_context(module) if builder == "transformers" else None
    context = checkpoint.context if builder == "megatron" or own is None else own
    name = families.find(context, checkpoint.tensors) if context is not None else None
    if context is None or name is None:
        if builder == "megatron" and (stacked := _stacked(checkpoint)) is not None:
            raise _of_no_model(module, checkpoint, stacked)
        return None
    family = families.load(name)
    if not family.dialects:
        return None
    dialect = families.dialect_in(family, checkpoint.context, checkpoint.tensors)
    # In files of Megatron's own spelling one tensor may hold all layers.
    is_stacked = builder == "megatron" and _stacked(checkpoint) is not None
    if dialect == _DIALECTS[builder] and not is_stacked:
        return None
    stored = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    config = described_by(family, context, {"backend": builder}, stored)
    if config is None:
        return None
    said = checkpoint.context
    is_its_own = said is not None and family.recognizes(said)
    described = config
    if said is not None and is_its_own:
        described = described_by(family, said, {}, stored) or config

    def names(live: nn.Module, shapes: Mapping[str, Dims]) -> Names:
        return family.names(config, live, dialect, shapes, described)

    return names


def _stacked(checkpoint: Checkpoint) -> str | None:
    """A stored tensor that holds all layers."""
    return next((name for name in checkpoint.tensors if _STACKED.search(name)), None)


def _of_no_model(module: nn.Module, checkpoint: Checkpoint, stacked: str) -> ConfigError:
    shape = list(checkpoint.tensors[stacked].shape)
    return ConfigError(
        f"{checkpoint.path} stores all layers in one tensor ({stacked} {shape}), and no saved "
        f"config in it says what model they are of; {type(module).__name__} has a tensor for each. "
        "Start the model by a recipe that gives its sizes, model.backend=megatron, or put the "
        "context folder or common.pt of the run back beside the weights."
    )


def described_by(
    family: Family, context: Context, own: Mapping[str, Any], shapes: Mapping[str, Dims]
) -> TrainableModelConfig | None:
    """The config that ``context`` alone describes; None if it leaves something open."""
    cls = family.config_for(context)
    record = make_record(cls, dict(own), {}, at="model")
    merged = merge(record, family.read_fields(context, shapes).fields, {})
    try:
        described: TrainableModelConfig = build(merged.record, at="model")
    except ConfigError:
        return None
    return described


def _builder_of(module: nn.Module) -> str | None:
    """Who builds modules of this class; asked only of libraries that are imported already."""
    library: Any = sys.modules.get("transformers")
    pretrained = getattr(library, "PreTrainedModel", None)
    if pretrained is not None and isinstance(module, pretrained):
        return "transformers"
    return "megatron" if families.is_megatron(module) else None


def _own_context(module: nn.Module) -> Context | None:
    config: Any = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        return None
    return Context("hf", f"{type(module).__name__}.config", config.to_dict(), model_type)
