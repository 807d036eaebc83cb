"""Names of Megatron before Megatron-Core, as NeMo 1 (without ``mcore_gpt``) and Megatron-LM wrote.

Layouts are those of Megatron-Core: fused by query group (checkpoints of version 2 and newer), gate
before up. NeMo 1 has a gate of its own tensor for activations that are not ``fast-``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bioinit.families import _megatron
from bioinit.layout import Dims
from bioinit.rules import Rule, dropped, rename

TOP = "language_model"
STACKS = (f"{TOP}.encoder", f"{TOP}.transformer")
"""Where the layers are: Megatron-LM called them ``transformer`` until the end of 2021."""

SECOND = "mlp.dense_h_to_4h_2."


def rules(
    config: Any,
    shapes: Mapping[str, Dims],
    *,
    gated: bool,
    stack: str = "decoder",
    add: float = 0.0,
) -> list[Rule]:
    """Aliases of a decoder's tensors; ``stack`` is the canonical name of what holds the layers."""
    word = "embedding.word_embeddings.weight"
    tied = config.share_embeddings_and_output_weights
    output = word if tied else "output_layer.weight"
    found = [
        _megatron.vocab(f"{TOP}.{word}", word, config, shapes),
        _megatron.vocab(f"{TOP}.output_layer.weight", output, config, shapes),
        _megatron.vocab("word_embeddings_for_head.weight", word, config, shapes),
    ]
    is_apart = any(SECOND in key for key in shapes)
    for at in STACKS:
        found += _layer(f"{at}.layers.*", f"{stack}.layers.*", config, gated, is_apart, add)
        for name in ("final_layernorm", "final_norm"):
            found += _megatron.norm(f"{at}.{name}.", f"{stack}.final_layernorm", add=add)
    why = "it is computed from rotary_base"
    found += [
        dropped(key, why) for key in (f"{TOP}.rotary_pos_emb.inv_freq", "rotary_pos_emb.inv_freq")
    ]
    return found


def _layer(
    at: str, to: str, config: Any, gated: bool, is_apart: bool, add: float
) -> Iterator[Rule]:
    for attention in ("self_attention", "attention"):
        for rule in _megatron.attention(f"{at}.{attention}", f"{to}.self_attention", config):
            name = rule.pattern_text.replace("linear_qkv", "query_key_value")
            yield replace(rule, pattern_text=name.replace("linear_proj", "dense"))
    for kind in _megatron.KINDS:
        first = f"{at}.mlp.dense_h_to_4h.{kind}"
        if gated and is_apart:
            yield rename(first, f"{to}.mlp.linear_fc1_gate.{kind}")
            yield rename(f"{at}.{SECOND}{kind}", f"{to}.mlp.linear_fc1_up.{kind}")
        elif gated:
            yield _megatron.gate_and_up(first, f"{to}.mlp", kind, config.ffn_hidden_size)
        else:
            yield rename(first, f"{to}.mlp.linear_fc1.{kind}")
        yield rename(f"{at}.mlp.dense_4h_to_h.{kind}", f"{to}.mlp.linear_fc2.{kind}")
    for word in ("layernorm", "norm"):
        yield from _megatron.norm(f"{at}.input_{word}.", f"{to}.input_layernorm", add=add)
        yield from _megatron.norm(
            f"{at}.post_attention_{word}.", f"{to}.pre_mlp_layernorm", add=add
        )
