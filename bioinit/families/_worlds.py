"""The tables of Megatron's worlds: what each calls the fields of a decoder, and what it assumes.

Three spellings: ``nemo2`` (``TransformerConfig`` and ``GPTConfig``; Bridge has the same), ``nemo1``
(``model_config.yaml``) and ``megatron`` (Megatron-LM's arguments).

Names and defaults: NeMo 2 ``llm/gpt/model/base.py``; NeMo 1 ``megatron_gpt_config.yaml`` and what
``megatron_gpt_model.py`` takes where it is silent; Megatron-LM ``training/arguments.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bioinit.families._fields import Codec, Joint, Only
from bioinit.families._kinds import ACTIVATIONS, activation_of, of_arguments, of_nemo1

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
_ROTARY = "this family has rotary positions over whole heads, halves apart"
_PLAIN = "this family has no such part"
REFUSED: Mapping[str, Mapping[str, Only]] = {
    "nemo2": {
        "position_embedding_type": Only(("rope",), _ROTARY),
        "rotary_interleaved": Only((False,), _ROTARY, written=False),
        "rotary_percent": Only((1.0,), _ROTARY, written=False),
        "mrope_section": Only((None,), _ROTARY, written=False),
        "no_rope_freq": Only((None,), _ROTARY, written=False),
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
        "position_embedding_type": Only(("rope",), _ROTARY),
        "rotary_interleaved": Only((False,), _ROTARY),
        "rotary_percentage": Only((1.0,), _ROTARY),
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
        "rotary_interleaved": Only((False,), _ROTARY),
        "rotary_percent": Only((1.0,), _ROTARY),
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

CODECS: Mapping[str, Mapping[str, Codec]] = {
    "nemo2": {"activation_func": (activation_of, ACTIVATIONS.__getitem__)},
}


def joints(
    like: str,
    *,
    gated: bool,
    normalization: str,
    is_zero_centered: bool,
    has_biases: bool,
    scales: bool,
) -> tuple[Joint, ...]:
    """What means something only together, for a family of this kind."""
    found = [_rope(like, scales), _biases(like, has_biases)]
    if like == "nemo2":
        return (*found, _centers(is_zero_centered))
    found += [
        _norms(like, normalization, is_zero_centered),
        _activations(like, gated),
        _lengths(like),
    ]
    if like == "megatron":
        found += [_GROUPS, _TIED, _POSITIONS]
    return tuple(found)


def _nothing(ours: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_FACTOR = {"nemo2": "seq_len_interpolation_factor", "nemo1": "seq_len_interpolation_factor"}
_ROPE = ("rope_type", "scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
_LLAMA3 = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_OLD_CONTEXT = 8192
_SWITCHES = ("rope_scaling", "use_rope_scaling", "scale_positional_embedding")
_FACTORS = ("scale_factor", "rope_scaling_factor")


def _rope(like: str, scales: bool) -> Joint:
    """Rotary scaling: none, position interpolation, or that of Llama 3.1."""
    linear = _FACTOR.get(like, "rotary_seq_len_interpolation_factor")
    theirs = {
        "nemo2": (linear, "rope_scaling", "rope_scaling_factor", *_ROPE[1:]),
        "nemo1": (linear, "scale_positional_embedding"),
        "megatron": (linear, "use_rope_scaling", "rope_scaling_factor"),
    }[like]

    def read(values: Mapping[str, Any]) -> dict[str, Any]:
        scaled = any(values.get(name) for name in _SWITCHES) or values.get("scale_factor")
        stretched = values.get(linear)
        if scaled and stretched not in (None, 1, 1.0):
            raise ValueError("rotary positions are scaled twice")
        if stretched not in (None, 1, 1.0):
            return {**dict.fromkeys(_ROPE), "rope_type": "linear", "scale_factor": stretched}
        if not scaled:
            return {**dict.fromkeys(_ROPE), "rope_type": "default"}
        factor = next((values[n] for n in _FACTORS if values.get(n)), _LLAMA3["scale_factor"])
        return {
            "rope_type": "llama3",
            "scale_factor": factor,
            "low_freq_factor": values.get("low_freq_factor") or _LLAMA3["low_freq_factor"],
            "high_freq_factor": values.get("high_freq_factor") or _LLAMA3["high_freq_factor"],
            "old_context_len": values.get("old_context_len") or _OLD_CONTEXT,
        }

    def write(ours: Mapping[str, Any]) -> dict[str, Any]:
        kind = ours["rope_type"]
        if kind == "default":
            return {}
        if kind == "linear":
            return {linear: ours["scale_factor"]}
        if kind == "llama3" and scales:
            missing = [name for name in _ROPE[1:] if ours[name] is None]
            if missing:
                raise ValueError(f"Llama 3.1's scaling needs {', '.join(missing)}")
            return {name: ours[name] for name in _ROPE[1:]}
        known = "default, linear and llama3" if scales else "default and linear"
        raise ValueError(f"it has rotary positions of the types {known}")

    return Joint(theirs, _ROPE, read, write)


def _biases(like: str, has_biases: bool) -> Joint:
    """One switch for the biases of all linear layers, and one for those of the fused projection."""
    ours = ("add_attention_bias", "add_mlp_bias") if has_biases else ()
    every = "bias" if like == "nemo1" else "add_bias_linear"

    def read(values: Mapping[str, Any]) -> dict[str, Any]:
        linear = bool(values[every])
        if values["add_qkv_bias"] and not linear:
            raise ValueError("queries, keys and values have a bias and no other layer has one")
        if linear and not has_biases:
            raise ValueError("the layers of this family have no biases")
        return dict.fromkeys(ours, linear)

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        if len(set(values.values())) > 1:
            raise ValueError(f"{every} is one switch for attention and MLP")
        return {every: any(values.values())}

    return Joint((every, "add_qkv_bias"), ours, read, write)


def _centers(is_zero_centered: bool) -> Joint:
    ours = (ZERO_CENTERED,) if is_zero_centered else ()

    def read(values: Mapping[str, Any]) -> dict[str, Any]:
        if values[ZERO_CENTERED] and not is_zero_centered:
            raise ValueError("the norms of this family are stored as they are")
        return dict.fromkeys(ours, bool(values[ZERO_CENTERED]))

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        return {ZERO_CENTERED: is_zero_centered}

    return Joint((ZERO_CENTERED,), ours, read, write)


def _norms(like: str, normalization: str, is_zero_centered: bool) -> Joint:
    """Of what kind norms are, and around what their weights are stored."""
    theirs = {
        "nemo1": ("normalization", ZERO_CENTERED),
        "megatron": ("normalization", "apply_layernorm_1p"),
    }[like]
    ours = (ZERO_CENTERED,) if is_zero_centered else ()
    kinds = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}

    def read(values: Mapping[str, Any]) -> dict[str, Any]:
        said = str(values["normalization"]).lower()
        if kinds[said] != normalization:
            raise ValueError(f"this family has a {normalization}")
        centered = bool(values[theirs[1]]) or said == "layernorm1p"
        if centered and not is_zero_centered:
            raise ValueError("the norms of this family are stored as they are")
        return dict.fromkeys(ours, centered)

    return Joint(theirs, ours, read, _nothing)


def _activations(like: str, gated: bool) -> Joint:
    theirs = {
        "nemo1": ("activation", "openai_gelu"),
        "megatron": ("swiglu", "squared_relu", "quick_geglu", "openai_gelu"),
    }[like]
    known = of_nemo1 if like == "nemo1" else of_arguments

    def read(values: Mapping[str, Any]) -> dict[str, Any]:
        is_gated, activation = known(values)
        if is_gated != gated:
            raise ValueError(f"the MLPs of this family have {'a' if gated else 'no'} gate")
        return {"activation_func": activation}

    return Joint(theirs, ("activation_func",), read, _nothing)


def _lengths(like: str) -> Joint:
    """How long a sequence may be; the length of the training samples may be shorter."""
    theirs = ("max_position_embeddings", "encoder_seq_length" if like == "nemo1" else "seq_length")

    def read(values: Mapping[str, Any]) -> dict[str, Any]:
        return {"seq_length": next((v for v in values.values() if v is not None), None)}

    return Joint(theirs, ("seq_length",), read, _nothing)


def _grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    grouped = values["group_query_attention"]
    return {"num_query_groups": values["num_query_groups"] if grouped else None}


def _tied(values: Mapping[str, Any]) -> dict[str, Any]:
    untied = bool(values["untie_embeddings_and_output_weights"])
    return {"share_embeddings_and_output_weights": not untied}


def _rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    rotary = values["use_rotary_position_embeddings"]
    if values["position_embedding_type"] != "rope" and not rotary:
        raise ValueError(_ROTARY)
    return {}


_GROUPS = Joint(
    ("group_query_attention", "num_query_groups"), ("num_query_groups",), _grouped, _nothing
)
_TIED = Joint(
    ("untie_embeddings_and_output_weights",),
    ("share_embeddings_and_output_weights",),
    _tied,
    _nothing,
)
_POSITIONS = Joint(
    ("position_embedding_type", "use_rotary_position_embeddings"), (), _rotary, _nothing
)
