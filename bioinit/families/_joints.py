"""Fields of Megatron's worlds that mean something only together: biases, norms, positions.

The spellings are those of :mod:`bioinit.families._worlds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from bioinit.families._fields import Joint
from bioinit.families._kinds import of_arguments, of_nemo1
from bioinit.families._worlds import ROTARY, ZERO_CENTERED

Biases = Literal["none", "all", "qkv"]
"""Which linear layers of a family may have a bias."""


def joints(
    like: str,
    *,
    gated: bool,
    normalization: str,
    is_zero_centered: bool,
    has_biases: Biases,
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


def _biases(like: str, has_biases: Biases) -> Joint:
    """One switch for the biases of all linear layers, and one for those of the fused projection."""
    if has_biases == "qkv":
        return _only_fused(like)
    ours = ("add_attention_bias", "add_mlp_bias") if has_biases == "all" else ()
    every = "bias" if like == "nemo1" else "add_bias_linear"

    def read(values: Mapping[str, Any]) -> dict[str, Any]:
        linear = bool(values[every])
        if values["add_qkv_bias"] and not linear:
            raise ValueError("queries, keys and values have a bias and no other layer has one")
        if linear and not ours:
            raise ValueError("the layers of this family have no biases")
        return dict.fromkeys(ours, linear)

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        if len(set(values.values())) > 1:
            raise ValueError(f"{every} is one switch for attention and MLP")
        return {every: any(values.values())}

    return Joint((every, "add_qkv_bias"), ours, read, write)


def _only_fused(like: str) -> Joint:
    """Queries, keys and values may have a bias, and no other layer has one."""
    every = "bias" if like == "nemo1" else "add_bias_linear"

    def read(values: Mapping[str, Any]) -> dict[str, Any]:
        if values[every]:
            raise ValueError("of this family, only queries, keys and values may have a bias")
        return {"add_qkv_bias": bool(values["add_qkv_bias"])}

    def write(values: Mapping[str, Any]) -> dict[str, Any]:
        return {every: False, **values}

    return Joint((every, "add_qkv_bias"), ("add_qkv_bias",), read, write)


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
        raise ValueError(ROTARY)
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
