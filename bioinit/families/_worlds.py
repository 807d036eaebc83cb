"""The tables of Megatron's worlds: what each calls the fields of a decoder, and what it assumes.

Three spellings: ``nemo2`` (``TransformerConfig`` and ``GPTConfig``; Bridge has the same), ``nemo1``
(``model_config.yaml``) and ``megatron`` (Megatron-LM's arguments).

Names and defaults: NeMo 2 ``llm/gpt/model/base.py``; NeMo 1 ``megatron_gpt_config.yaml`` and what
``megatron_gpt_model.py`` takes where it is silent; Megatron-LM ``training/arguments.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bioinit.families._fields import Codec, Only
from bioinit.families._kinds import ACTIVATIONS, activation_of

ZERO_CENTERED = "layernorm_zero_centered_gamma"
NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
SAME = (
    "vocab_size",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "init_method_std",
    "attention_dropout",
    "rotary_base",
    "make_vocab_size_divisible_by",
)
"""Fields that all four worlds call as we do."""

_EXPERTS = "this family has one MLP per layer and no experts"
ROTARY = "this family has rotary positions over whole heads, halves apart"
_PLAIN = "this family has no such part"
REFUSED: Mapping[str, Mapping[str, Only]] = {
    "nemo2": {
        "position_embedding_type": Only(("rope",), ROTARY),
        "rotary_interleaved": Only((False,), ROTARY, written=False),
        "rotary_percent": Only((1.0,), ROTARY, written=False),
        "mrope_section": Only((None,), ROTARY, written=False),
        "no_rope_freq": Only((None,), ROTARY, written=False),
        "num_moe_experts": Only((None, 0), _EXPERTS, written=False),
        **{
            name: Only(neutral, _PLAIN, written=False)
            for name, neutral in {
                "qk_layernorm": (False,),
                "qk_l2_norm": (False,),
                "multi_latent_attention": (False,),
                "apply_residual_connection_post_layernorm": (False,),
                "heterogeneous_block_specs": (False,),
                "is_hybrid_model": (False,),
                "mtp_num_layers": (None, 0),
                "softmax_scale": (None,),
                "softmax_type": ("vanilla",),
                "window_size": (None,),
                "window_attn_skip_freq": (None,),
                "glu_linear_offset": (0.0,),
                "activation_func_clamp_value": (None,),
                "attention_output_gate": (False,),
                "experimental_attention_variant": (None,),
                "linear_attention_freq": (None,),
            }.items()
        },
    },
    "nemo1": {
        "position_embedding_type": Only(("rope",), ROTARY),
        "rotary_interleaved": Only((False,), ROTARY),
        "rotary_percentage": Only((1.0,), ROTARY),
        "num_moe_experts": Only((None, 0), _EXPERTS),
        **{
            name: Only(neutral, _PLAIN)
            for name, neutral in {
                "transformer_block_type": ("pre_ln",),
                "attention_type": ("multihead",),
                "headscale": (False,),
                "normalize_attention_scores": (True,),
                "megatron_legacy": (False,),
                "qk_layernorm": (False,),
                "window_size": (None,),
                "apply_embedding_scaling": (False,),
                "mcore_customization_config": (None, {}),
                "apply_residual_connection_post_layernorm": (False,),
                "use_hyena": (False,),
            }.items()
        },
    },
    "megatron": {
        "rotary_interleaved": Only((False,), ROTARY),
        "rotary_percent": Only((1.0,), ROTARY),
        "num_experts": Only((None, 0), _EXPERTS),
        **{
            name: Only(neutral, _PLAIN)
            for name, neutral in {
                "qk_layernorm": (False,),
                "qk_l2_norm": (False,),
                "multi_latent_attention": (False,),
                "apply_residual_connection_post_layernorm": (False,),
                "apply_residual_connection_post_norm": (False,),
                "is_hybrid_model": (False,),
                "hybrid_attention_ratio": (0.0,),
                "mtp_num_layers": (None, 0),
                "softmax_type": ("vanilla",),
                "window_size": (None,),
                "heterogeneous_layers_config_path": (None,),
                "heterogeneous_layers_config_encoded_json": (None,),
                "transformer_pipeline_model_parallel_size": (None,),
            }.items()
        },
    },
}
"""Their fields that have one meaning for a plain decoder, and what else would make of it."""

REST = "an argument of the run that shapes no part of this model"

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "nemo2": {
        "num_query_groups": None,
        "kv_channels": None,
        "ffn_hidden_size": None,
        "layernorm_epsilon": 1e-5,
        "init_method_std": 0.02,
        "attention_dropout": 0.1,
        "share_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 128,
        "rotary_base": 10000,
        "window_size": None,
        "seq_length": 1024,
        "position_embedding_type": "learned_absolute",
        "rotary_percent": 1.0,
        "normalization": "LayerNorm",
        ZERO_CENTERED: False,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "activation_func": "torch.nn.functional.gelu",
        "gated_linear_unit": False,
    },
    "nemo1": {
        "num_query_groups": None,
        "kv_channels": None,
        "layernorm_epsilon": 1e-5,
        "init_method_std": 0.02,
        "attention_dropout": 0.1,
        "share_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 128,
        "rotary_base": 10000,
        "window_size": None,
        "encoder_seq_length": 512,
        "position_embedding_type": "learned_absolute",
        "rotary_percentage": 1.0,
        "normalization": "layernorm",
        "bias": True,
        "activation": "gelu",
    },
    "megatron": {
        "kv_channels": None,
        "init_method_std": 0.02,
        "attention_dropout": 0.1,
        "make_vocab_size_divisible_by": 128,
        "rotary_base": 10000,
        "window_size": None,
        "rotary_percent": 1.0,
        "group_query_attention": False,
        "norm_epsilon": 1e-5,
        "untie_embeddings_and_output_weights": False,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
        "apply_layernorm_1p": False,
        "swiglu": False,
    },
}

NAMES: Mapping[str, Mapping[str, str]] = {
    "nemo2": {
        name: name
        for name in (
            "num_query_groups",
            "layernorm_epsilon",
            "seq_length",
            "share_embeddings_and_output_weights",
            "activation_func",
        )
    },
    "nemo1": {
        name: name
        for name in (
            "num_query_groups",
            "layernorm_epsilon",
            "share_embeddings_and_output_weights",
        )
    },
    "megatron": {"norm_epsilon": "layernorm_epsilon", "layernorm_epsilon": "layernorm_epsilon"},
}
"""Their name to ours, beside :data:`SAME`."""


def _window(value: Any) -> int | None:
    """How many tokens attention looks back; those ahead are never seen."""
    if value is None:
        return None
    before, ahead = value
    if ahead not in (0, None):
        raise ValueError("attention looks ahead")
    return None if before == -1 else int(before)


WINDOW: Codec = (_window, lambda tokens: None if tokens is None else [tokens, 0])
"""The window of attention: tokens before and ahead, and how many before for us."""


def _function(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"it has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


CODECS: Mapping[str, Mapping[str, Codec]] = {
    "nemo2": {"activation_func": (activation_of, _function)},
}
