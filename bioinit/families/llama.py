"""Llama 2, 3, 3.1 and 3.2: decoders with rotary positions, RMS norms and gated MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends.transformers.named import Translation
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.contexts.protocol import Context
from bioinit.families import _decoder, _megatron
from bioinit.families._fields import World
from bioinit.families._named import hf, named_family
from bioinit.families.protocol import Canonical, Dialect, ReadFields
from bioinit.layout import Dims
from bioinit.rules import Rule

TRANSLATION = Translation(
    "llama",
    names={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
        "initializer_range": "init_method_std",
        "attention_dropout": "attention_dropout",
        "attention_bias": "add_qkv_bias",
        "mlp_bias": "add_mlp_bias",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
        "rope_parameters.rope_theta": "rotary_base",
        "rope_parameters.rope_type": "rope_type",
        "rope_parameters.factor": "scale_factor",
        "rope_parameters.low_freq_factor": "low_freq_factor",
        "rope_parameters.high_freq_factor": "high_freq_factor",
        "rope_parameters.original_max_position_embeddings": "old_context_len",
    },
)


@dataclass(kw_only=True)
class LlamaConfig(TrainableModelConfig):
    """A Llama model. The defaults are those of Llama 2 7B; sizes are presets in ``conf/model``.

    ``extra`` holds fields of ``config.json`` that only transformers reads.
    """

    architecture: str | None = own("causal_lm")
    vocab_size: int = 32000
    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 11008
    num_attention_heads: int = 32
    num_query_groups: int | None = derived(lambda c: c.num_attention_heads)
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    seq_length: int = 4096
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    add_qkv_bias: bool = False
    add_mlp_bias: bool = False
    share_embeddings_and_output_weights: bool = False
    rotary_base: float = 10000.0
    rope_type: str = "default"
    scale_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    old_context_len: int | None = None
    make_vocab_size_divisible_by: int = 128
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        TRANSLATION.check_extra(self.extra)

    def configure_model(self) -> nn.Module:
        """Construct the transformers model."""
        return TRANSLATION.construct(self)


def _tensors(config: LlamaConfig) -> dict[str, Canonical]:
    return _decoder.tensors(
        config,
        qkv_bias=config.add_qkv_bias,
        proj_bias=config.add_qkv_bias,
        mlp_bias=config.add_mlp_bias,
    )


def _rules(config: TrainableModelConfig, shapes: Mapping[str, Dims], body: str) -> list[Rule]:
    return _megatron.gpt(config, shapes, gated=True)


WORLD = World(
    dialect="nemo2",
    names={
        "vocab_size": "vocab_size",
        "num_layers": "num_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_query_groups",
        "kv_channels": "kv_channels",
        "seq_length": "seq_length",
        "layernorm_epsilon": "layernorm_epsilon",
        "init_method_std": "init_method_std",
        "attention_dropout": "attention_dropout",
        "add_qkv_bias": "add_qkv_bias",
        "share_embeddings_and_output_weights": "share_embeddings_and_output_weights",
        "rotary_base": "rotary_base",
        "make_vocab_size_divisible_by": "make_vocab_size_divisible_by",
    },
)


def _recognizes(context: Context) -> bool:
    return str((context.raw or {}).get("canonical")).endswith("llama.LlamaConfig")


def _read(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
    return WORLD.read(context)


NEMO2 = Dialect(
    rules=_rules, spells=_megatron.spells("decoder"), recognizes=_recognizes, read=_read
)

FAMILY = named_family(
    LlamaConfig,
    TRANSLATION,
    {
        "hf": hf(
            TRANSLATION,
            lambda config: _decoder.lines(),
            ("self_attn.q_proj.weight",),
            _megatron.heads_of,
        ),
        "nemo2": NEMO2,
    },
    _tensors,
)
