"""Megatron-Core's tensors: names and layouts that its models share, stacked or one per layer.

NeMo 2 (``module.``), NeMo 1 (``model.``), Megatron-Bridge and Megatron-LM keep the same tree; what
stands in front of it is solved from the names. torch_dist and zarr stack the layers on dim 0 and
spell layer norms as Transformer Engine does, inside of the linear layer behind them; live models
and files per rank have a name per layer, and the local spec's spelling of norms.

Layouts: megatron-core 0.16.1, ``transformer/attention.py`` (query groups: the queries of a group,
its key, its value), ``transformer/mlp.py`` (gate before up), ``transformer/moe/experts.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from bioinit.backends.transformers.named import Heads
from bioinit.keys import Pattern
from bioinit.layout import Dims
from bioinit.rules import Narrow, Part, Rule, Unflatten, rename, stacked

KINDS = ("weight", "bias")
EXTRA_STATE = "_extra_state"


def padded(vocab_size: int, divisor: int) -> int:
    """Rows of an embedding: the vocabulary, rounded up to a multiple of ``divisor``."""
    return math.ceil(vocab_size / divisor) * divisor


def heads_of(config: Any) -> Heads:
    """How the rows of attention of ``config`` are factored; without groups, each head is one."""
    groups = getattr(config, "num_query_groups", None) or config.num_attention_heads
    return Heads(groups, config.num_attention_heads // groups, config.kv_channels)


def both(rule: Rule) -> tuple[Rule, Rule]:
    """A rule for a tensor of one layer: stacked as files have it, and by layer."""
    return stacked(rule), rule


def vocab(key: str, to: str, config: Any, shapes: Mapping[str, Dims]) -> Rule:
    """An embedding or its bias: rows beyond the vocabulary are filled and dropped."""
    pattern = Pattern(key)
    held = next(
        (s[0] for k, s in shapes.items() if s and pattern.match(_bare(k, key)) is not None), None
    )
    size = config.vocab_size
    rows = padded(size, config.make_vocab_size_divisible_by) if held is None else max(held, size)
    return Rule(key, (Part(to, (Narrow(0, 0, size, rows),)),), fill=True)


def attention(at: str, to: str, config: Any) -> Iterator[Rule]:
    """The fused projection by query group, and the projection back."""
    groups, per_group, channels = heads_of(config)
    fused = Unflatten(0, (groups, per_group + 2, channels))
    for kind in KINDS:
        yield Rule(
            f"{at}.linear_qkv.{kind}",
            (
                Part(f"{to}.linear_q.{kind}", (fused, Narrow(1, 0, per_group))),
                Part(f"{to}.linear_k.{kind}", (fused, Narrow(1, per_group, 1))),
                Part(f"{to}.linear_v.{kind}", (fused, Narrow(1, per_group + 1, 1))),
            ),
        )
    for kind in KINDS:
        yield rename(f"{at}.linear_proj.{kind}", f"{to}.linear_proj.{kind}")


def gate_and_up(key: str, to: str, kind: str, ffn: int, *before: Any) -> Rule:
    """The first linear layer of a gated MLP: gate, then up."""
    return Rule(
        key,
        (
            Part(f"{to}.linear_fc1_gate.{kind}", (*before, Narrow(0, 0, ffn))),
            Part(f"{to}.linear_fc1_up.{kind}", (*before, Narrow(0, ffn, ffn))),
        ),
    )


def mlp(at: str, to: str, config: Any, *, gated: bool) -> Iterator[Rule]:
    """Both linear layers of an MLP."""
    for kind in KINDS:
        if gated:
            yield gate_and_up(f"{at}.linear_fc1.{kind}", to, kind, config.ffn_hidden_size)
        else:
            yield rename(f"{at}.linear_fc1.{kind}", f"{to}.linear_fc1.{kind}")
        yield rename(f"{at}.linear_fc2.{kind}", f"{to}.linear_fc2.{kind}")


def norm(at: str, to: str, *, add: float = 0.0) -> Iterator[Rule]:
    """A layer norm; ``add`` where it is stored around another zero than the canonical one."""
    for kind in KINDS:
        shift = add if kind == "weight" else 0.0
        yield Rule(f"{at}{kind}", (Part(f"{to}.{kind}", (), shift),))


def transformer(
    config: Any,
    stack: str,
    *,
    gated: bool,
    mlp_rules: Sequence[Rule] | None = None,
    add: float = 0.0,
) -> list[Rule]:
    """The layers of ``stack`` (``decoder`` or ``encoder``) and the norm behind them.

    Args:
        config: of the family.
        stack: the name in Megatron, and in the canonical space.
        gated: whether the MLP has a gate.
        mlp_rules: rules for one layer's MLP, where it is another.
        add: what is added to the stored weight of a norm.
    """
    layer = f"{stack}.layers.*"
    first, second = f"{layer}.input_layernorm", f"{layer}.pre_mlp_layernorm"
    inner = [
        *attention(f"{layer}.self_attention", f"{layer}.self_attention", config),
        *(mlp_rules or mlp(f"{layer}.mlp", f"{layer}.mlp", config, gated=gated)),
        *norm(f"{layer}.self_attention.linear_qkv.layer_norm_", first, add=add),
        *norm(f"{layer}.mlp.linear_fc1.layer_norm_", second, add=add),
    ]
    plain = [
        *norm(f"{layer}.input_layernorm.", first, add=add),
        *norm(f"{layer}.pre_mlp_layernorm.", second, add=add),
    ]
    pairs = [both(rule) for rule in (*inner, *plain)]
    return [
        *(pair[0] for pair in pairs),
        *norm(f"{stack}.final_layernorm.", f"{stack}.final_layernorm", add=add),
        *(pair[1] for pair in pairs),
    ]


def gpt(
    config: Any,
    shapes: Mapping[str, Dims],
    *,
    gated: bool,
    mlp_rules: Sequence[Rule] | None = None,
    add: float = 0.0,
) -> list[Rule]:
    """The table of a GPT: embedding, decoder, output layer."""
    return [
        *embeddings(config, shapes),
        *transformer(config, "decoder", gated=gated, mlp_rules=mlp_rules, add=add),
    ]


def embeddings(config: Any, shapes: Mapping[str, Dims]) -> list[Rule]:
    """The word embedding and the output layer, which is the embedding once more where tied."""
    word = "embedding.word_embeddings.weight"
    output = word if config.share_embeddings_and_output_weights else "output_layer.weight"
    return [
        vocab(word, word, config, shapes),
        vocab("output_layer.weight", output, config, shapes),
    ]


def spells(stack: str, *, is_legacy: bool = False) -> Callable[[Collection[str]], bool]:
    """Whether stored names are Megatron-Core's, with layers in ``stack``.

    With ``is_legacy``, those of Megatron before Megatron-Core are taken for them too.
    """
    end = f"{stack}.layers.self_attention.linear_qkv.weight"
    patterns = [rf"{stack}\.layers\.\d+\.self_attention\.linear_qkv\.weight"]
    if is_legacy:
        legacy = r"language_model\.(encoder|transformer)\.layers\.\d+"
        patterns.append(rf"{legacy}\.(self_)?attention\.query_key_value\.weight")
    found = re.compile(rf"(.*\.)?({'|'.join(patterns)})")

    def is_spelled(stored: Collection[str]) -> bool:
        return any(
            key.endswith(end) or (key.endswith(".weight") and found.fullmatch(key) is not None)
            for key in stored
        )

    return is_spelled


def extra_states(
    keys: Collection[str], num_layers: int, front: str, num_experts: int = 0
) -> dict[str, bytes]:
    """Empty extra states of the linear layers among ``keys``: Megatron's loader asks for them.

    Those of experts are counted by layer and by expert.
    """
    found: dict[str, bytes] = {}
    for key in keys:
        module, _, kind = key.rpartition(".")
        if kind != "weight" or ".linear_" not in module:
            continue
        is_stacked = ".layers." in module
        places = [f"{n}_{num_layers}" for n in range(num_layers)] if is_stacked else ["0_1"]
        if ".experts." in module:
            places = [
                f"{layer}.{expert}_{num_layers}.{num_experts}"
                for layer in range(num_layers)
                for expert in range(num_experts)
            ]
        for place in places:
            found[f"{front}{module}.{EXTRA_STATE}/shard_{place}"] = b""
    return found


def _bare(key: str, wanted: str) -> str:
    """``key`` without what wrappers put in front, if it ends like ``wanted``."""
    return wanted if key.endswith(f".{wanted}") else key


__all__ = [
    "KINDS",
    "attention",
    "both",
    "embeddings",
    "extra_states",
    "gate_and_up",
    "gpt",
    "heads_of",
    "mlp",
    "norm",
    "padded",
    "spells",
    "transformer",
    "vocab",
]
