"""Gemma: decoders with scaled embeddings, tied heads, and norms whose weights are around zero.

NeMo 1 stores the weights of norms as ``1 + weight``: its converter added the one, and its config
does not say ``layernorm_zero_centered_gamma``. NeMo 2 and later worlds store them as Hugging Face
does. The field tells them apart; what is written is always around zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends.transformers.named import Translation
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.errors import ConfigError
from bioinit.families import _decoder, _megatron
from bioinit.families._fields import Only
from bioinit.families._gpt import Gpt
from bioinit.families._kinds import Kind
from bioinit.families._live import gpt
from bioinit.families._named import hf, named_family
from bioinit.families.protocol import Canonical

TRANSLATION = Translation(
    "gemma", names={**_decoder.FIELDS, "attention_bias": "add_attention_bias"}
)


@dataclass(kw_only=True)
class GemmaConfig(TrainableModelConfig):
    """A Gemma model. The defaults are those of Gemma 7B; sizes are presets in ``conf/model``.

    ``layernorm_zero_centered_gamma`` says how a checkpoint stores norms, and shapes no model.
    ``extra`` holds fields of ``config.json`` that only transformers reads.
    """

    architecture: str | None = own("causal_lm")
    vocab_size: int = 256000
    num_layers: int = 28
    hidden_size: int = 3072
    ffn_hidden_size: int = 24576
    num_attention_heads: int = 16
    num_query_groups: int | None = derived(lambda c: c.num_attention_heads)
    kv_channels: int | None = 256
    activation_func: str = "gelu_pytorch_tanh"
    seq_length: int = 8192
    layernorm_epsilon: float = 1e-6
    layernorm_zero_centered_gamma: bool = True
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    add_attention_bias: bool = False
    share_embeddings_and_output_weights: bool = True
    rotary_base: float = 10000.0
    rope_type: str = "default"
    scale_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    old_context_len: int | None = None
    make_vocab_size_divisible_by: int | None = derived(lambda c: _decoder.divisor(c.vocab_size))
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _decoder.check_heads(self)
        TRANSLATION.check_extra(self.extra)

    def configure_model(self) -> nn.Module:
        """Construct the transformers model."""
        return TRANSLATION.construct(self)


def _tensors(config: GemmaConfig) -> dict[str, Canonical]:
    bias = config.add_attention_bias
    return _decoder.tensors(config, qkv_bias=bias, proj_bias=bias)


def _is_gemma(kind: Kind) -> bool:
    plain = kind._replace(activation="gelu")
    return plain == Kind("RMSNorm", gated=True, activation="gelu", rotary=True) and "gelu" in (
        kind.activation
    )


def _megatron_model(config: GemmaConfig) -> nn.Module:
    if config.add_attention_bias:
        raise ConfigError(
            "add_attention_bias is True, and megatron-core has biases in attention and MLP alike. "
            "Leave model.backend out: transformers builds it."
        )
    return gpt(
        config,
        TRANSLATION,
        {"layernorm_zero_centered_gamma": config.layernorm_zero_centered_gamma},
        embedding_scale=config.hidden_size**0.5,
    )


_AT = "nemo.collections.llm.gpt.model.gemma"
_PLAIN: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": "nemo.collections.llm.fn.activation.openai_gelu",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "seq_length": 8192,
    "kv_channels": 256,
    "attention_dropout": 0.0,
    "share_embeddings_and_output_weights": True,
    "layernorm_zero_centered_gamma": True,
}
_2B = {
    "num_layers": 18,
    "hidden_size": 2048,
    "num_attention_heads": 8,
    "num_query_groups": 1,
    "ffn_hidden_size": 16384,
}
_7B = {
    "num_layers": 28,
    "hidden_size": 3072,
    "num_attention_heads": 16,
    "num_query_groups": 16,
    "ffn_hidden_size": 24576,
}

CLASSES: dict[str, dict[str, Any]] = {
    "GemmaConfig": _PLAIN,
    "GemmaConfig2B": {**_PLAIN, **_2B},
    "GemmaConfig7B": {**_PLAIN, **_7B},
    "CodeGemmaConfig2B": {**_PLAIN, **_2B},
    "CodeGemmaConfig7B": {**_PLAIN, **_7B},
}
"""NeMo 2's classes, and what each sets."""

BRIDGE = {
    name.replace("Config", "ModelProvider"): {
        **sets,
        "layernorm_epsilon": 1e-6,
        "vocab_size": 256000,
    }
    for name, sets in CLASSES.items()
}

GPT = Gpt(
    tensors=_tensors,
    gated=True,
    normalization="RMSNorm",
    fits=_is_gemma,
    at=_AT,
    classes=CLASSES,
    model=f"{_AT}.GemmaModel",
    at_bridge="megatron.bridge.models.gemma.gemma_provider",
    bridge=BRIDGE,
    config_class=lambda config: f"{_AT}.GemmaConfig",
    is_zero_centered=True,
    only={"nemo1": {"apply_embedding_scaling": Only((True,), "Gemma's embeddings are scaled")}},
    lacks={"add_attention_bias": (False,)},
)

FAMILY = named_family(
    GemmaConfig,
    TRANSLATION,
    {
        "hf": hf(
            TRANSLATION,
            lambda config: _decoder.lines(),
            ("self_attn.q_proj.weight",),
            _megatron.heads_of,
            more=_decoder.computed,
        ),
        **GPT.dialects(),
    },
    _tensors,
    megatron=_megatron_model,
)
