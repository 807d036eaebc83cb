"""Decoders of one kind: Llama's names on Hugging Face, and the canonical space they lead to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from bioinit.backends.transformers.named import Line, check_sizes, linear
from bioinit.errors import ConfigError
from bioinit.families._megatron import heads_of
from bioinit.families.protocol import Canonical
from bioinit.layout import Dims
from bioinit.rules import Rule, dropped

FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "hidden_act": "activation_func",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "rope_parameters.rope_theta": "rotary_base",
    "rope_parameters.rope_type": "rope_type",
    "rope_parameters.factor": "scale_factor",
    "rope_parameters.low_freq_factor": "low_freq_factor",
    "rope_parameters.high_freq_factor": "high_freq_factor",
    "rope_parameters.original_max_position_embeddings": "old_context_len",
}
"""What ``config.json`` of a decoder calls our fields."""

LAYER = "layers.*"
TO = "decoder.layers.*"


def lines(*, gated: bool = True) -> tuple[Line, ...]:
    """The tensors of a decoder in the hf dialect, norms and heads included."""
    first = (
        (
            *linear(f"{LAYER}.mlp.gate_proj", f"{TO}.mlp.linear_fc1_gate"),
            *linear(f"{LAYER}.mlp.up_proj", f"{TO}.mlp.linear_fc1_up"),
        )
        if gated
        else linear(f"{LAYER}.mlp.up_proj", f"{TO}.mlp.linear_fc1")
    )
    return (
        *outside(),
        *around(),
        *first,
        *linear(f"{LAYER}.mlp.down_proj", f"{TO}.mlp.linear_fc2"),
    )


def outside() -> tuple[Line, ...]:
    """What is not in a layer: embedding, last norm, the heads of every task."""
    return (
        Line("embed_tokens.weight", "embedding.word_embeddings.weight"),
        *linear("norm", "decoder.final_layernorm"),
        Line("lm_head.weight", "output_layer.weight", is_body=False),
        *linear("score", "score", is_body=False),
        *linear("qa_outputs", "qa_outputs", is_body=False),
    )


def around() -> tuple[Line, ...]:
    """Attention and the two norms of a layer."""
    return (
        *linear(f"{LAYER}.input_layernorm", f"{TO}.input_layernorm"),
        *linear(f"{LAYER}.self_attn.q_proj", f"{TO}.self_attention.linear_q", heads="query"),
        *linear(f"{LAYER}.self_attn.k_proj", f"{TO}.self_attention.linear_k", heads="key"),
        *linear(f"{LAYER}.self_attn.v_proj", f"{TO}.self_attention.linear_v", heads="key"),
        *linear(f"{LAYER}.self_attn.o_proj", f"{TO}.self_attention.linear_proj"),
        *linear(f"{LAYER}.post_attention_layernorm", f"{TO}.pre_mlp_layernorm"),
    )


def computed(config: Any) -> tuple[Rule, ...]:
    """Rotary frequencies, which older checkpoints hold once per layer."""
    why = "it is computed from rotary_base"
    return tuple(
        dropped(f"{body}{LAYER}.self_attn.rotary_emb.inv_freq", why) for body in ("", "model.")
    )


def divisor(vocab_size: int) -> int:
    """The largest power of two up to 128 that divides ``vocab_size``: no row is padding then."""
    return math.gcd(vocab_size, 128)


def check_heads(config: Any) -> None:
    """Raise if query groups do not divide the heads.

    Raises:
        ConfigError: they do not, or a size is none.
    """
    check_sizes(config)
    heads, groups = config.num_attention_heads, config.num_query_groups
    if heads % groups:
        raise ConfigError(
            f"num_attention_heads={heads} is no multiple of num_query_groups={groups}. Correct one "
            "of them; num_query_groups is the number of heads when it is left out."
        )


def tensors(
    config: Any,
    *,
    gated: bool = True,
    norm_bias: bool = False,
    qkv_bias: bool = False,
    proj_bias: bool = False,
    mlp_bias: bool = False,
) -> dict[str, Canonical]:
    """The canonical space of a decoder, for a config."""
    found: dict[str, Dims] = {
        "embedding.word_embeddings.weight": (config.vocab_size, config.hidden_size),
        "decoder.final_layernorm.weight": (config.hidden_size,),
    }
    if norm_bias:
        found["decoder.final_layernorm.bias"] = (config.hidden_size,)
    if not config.share_embeddings_and_output_weights:
        found["output_layer.weight"] = (config.vocab_size, config.hidden_size)
    for number in range(config.num_layers):
        at = f"decoder.layers.{number}"
        found.update(attention(at, config, qkv_bias=qkv_bias, proj_bias=proj_bias))
        found.update(mlp(f"{at}.mlp", config, gated=gated, bias=mlp_bias))
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            found[f"{at}.{norm}.weight"] = (config.hidden_size,)
            if norm_bias:
                found[f"{at}.{norm}.bias"] = (config.hidden_size,)
    return {key: Canonical(shape) for key, shape in found.items()}


def attention(
    at: str, config: Any, *, qkv_bias: bool, proj_bias: bool
) -> Iterator[tuple[str, Dims]]:
    """Canonical tensors of one layer's attention."""
    groups, per_group, channels = heads_of(config)
    for name, each in (("q", per_group), ("k", 1), ("v", 1)):
        yield (
            f"{at}.self_attention.linear_{name}.weight",
            (groups, each, channels, config.hidden_size),
        )
        if qkv_bias:
            yield f"{at}.self_attention.linear_{name}.bias", (groups, each, channels)
    inner = groups * per_group * channels
    yield f"{at}.self_attention.linear_proj.weight", (config.hidden_size, inner)
    if proj_bias:
        yield f"{at}.self_attention.linear_proj.bias", (config.hidden_size,)


def mlp(at: str, config: Any, *, gated: bool, bias: bool) -> Iterator[tuple[str, Dims]]:
    """Canonical tensors of one MLP, or of one expert."""
    ffn, hidden = config.ffn_hidden_size, config.hidden_size
    for name in ("linear_fc1_gate", "linear_fc1_up") if gated else ("linear_fc1",):
        yield f"{at}.{name}.weight", (ffn, hidden)
        if bias:
            yield f"{at}.{name}.bias", (ffn,)
    yield f"{at}.linear_fc2.weight", (hidden, ffn)
    if bias:
        yield f"{at}.linear_fc2.bias", (hidden,)
