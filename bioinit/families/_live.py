"""Models of megatron-core for decoders: what a config of ours is in Megatron's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bioinit.backends import megatron
from bioinit.backends.transformers.named import Translation
from bioinit.errors import ConfigError
from bioinit.families._megatron import padded

_TASKS = ("CausalLM", "LMHeadModel")


def gpt(config: Any, translation: Translation, fields: Mapping[str, Any], **more: Any) -> nn.Module:
    """The ``GPTModel`` of a decoder's config.

    Args:
        config: of the family.
        translation: says which class of transformers ``config.architecture`` means.
        fields: of ``TransformerConfig``, beside those that every decoder here has.
        more: of :func:`bioinit.backends.megatron.gpt`.

    Raises:
        ConfigError: megatron-core has no such model.
    """
    task = translation.model_class(config).__name__
    if not task.endswith(_TASKS):
        raise ConfigError(
            f"model.architecture={config.architecture!r}, and megatron-core's GPT is a causal "
            "language model with no other head. Set model.architecture=causal_lm, or leave "
            "model.backend out: transformers builds it."
        )
    common = {
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "activation_func": activation(config.activation_func),
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
    }
    positions: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": config.rotary_base,
    }
    return megatron.gpt(
        config,
        {**common, **fields},
        vocab_size=padded(config.vocab_size, config.make_vocab_size_divisible_by),
        divisor=config.make_vocab_size_divisible_by,
        **{**positions, **scaling(config), **more},
    )


def activation(name: str) -> str:
    """Megatron's word for an activation of transformers'."""
    return {"gelu_pytorch_tanh": "openai_gelu", "relu2": "squared_relu"}.get(name, name)


def scaling(config: Any) -> dict[str, Any]:
    """How rotary positions are scaled, for :func:`bioinit.backends.megatron.gpt`.

    Raises:
        ConfigError: in a way that megatron-core does not know.
    """
    if config.rope_type == "default":
        return {}
    if config.rope_type == "linear":
        return {"seq_len_interpolation_factor": config.scale_factor}
    if config.rope_type == "llama3":
        found = {
            "factor": config.scale_factor,
            "low_freq_factor": config.low_freq_factor,
            "high_freq_factor": config.high_freq_factor,
            "original_max_position_embeddings": config.old_context_len,
        }
        return {"rope_scaling": {name: value for name, value in found.items() if value is not None}}
    raise ConfigError(
        f"rope_type={config.rope_type!r}, and megatron-core's models know default, linear and "
        "llama3. Leave model.backend out: transformers builds it."
    )
