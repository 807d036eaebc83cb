"""Encoders of Megatron-Core, with the heads of BERT: what ``esm2``, ``bert`` and ``biobert`` share.

The table of names, NeMo 1's older spelling of the same tree, and the canonical tensors. A layer
norm stands before what it normalizes (``esm2``, ``biobert``) or after it (``bert``); a model of one
kind is none of the other, whatever its tensors are called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from bioinit.backends.transformers.named import Line, linear
from bioinit.backends.transformers.named import norm as hf_norm
from bioinit.families._megatron import (
    KINDS,
    both,
    embeddings,
    heads_of,
    norm,
    spells,
    transformer,
    vocab,
)
from bioinit.families.protocol import Canonical
from bioinit.layout import Dims
from bioinit.rules import Rule, dropped, rename

LAYER = "encoder.layers"
WORD = "embedding.word_embeddings.weight"
POSITION = "embedding.position_embeddings.weight"
TYPE = "embedding.tokentype_embeddings.weight"
OUTER_BIAS = "lm_head.bias"
BEFORE = ("input_layernorm", "pre_mlp_layernorm")
"""The norms of a layer, each before what it normalizes."""
AFTER = ("post_att_layernorm", "post_mlp_layernorm")
"""The norms of a layer, each after what it normalizes, as NeMo calls them."""

APART = (
    "BERT normalizes after attention and MLP (post-layer-norm, the family bert), and Megatron's "
    "BERT before them (pre-layer-norm, the family biobert): no renaming makes one the other"
)
"""Why a checkpoint of one family is none of the other."""

TENSOR_PARALLEL = {
    **{f"encoder.layer.*.attention.self.{name}": "colwise" for name in ("query", "key", "value")},
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
"""Attention by heads and the MLP by its inner size, in the modules of transformers."""

_FIRST = "encoder.initial_layernorm"
_FRONT = "language_model."
_OLDER = (
    ("self_attention.linear_qkv.", "self_attention.query_key_value."),
    ("self_attention.linear_proj.", "self_attention.dense."),
    ("mlp.linear_fc1.", "mlp.dense_h_to_4h."),
    ("mlp.linear_fc2.", "mlp.dense_4h_to_h."),
    (".pre_mlp_layernorm.", ".post_attention_layernorm."),
)
_is_tree = spells("encoder")


def encoder(config: Any, norms: tuple[str, str]) -> dict[str, Canonical]:
    """The canonical tensors of the layers; ``norms`` are the two of each."""
    groups, per_group, channels = heads_of(config)
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    inner = groups * per_group * channels
    shapes: dict[str, Dims] = {}
    for number in range(config.num_layers):
        at = f"{LAYER}.{number}"
        for name, each in (("q", per_group), ("k", 1), ("v", 1)):
            factors = (groups, each, channels)
            shapes[f"{at}.self_attention.linear_{name}.weight"] = (*factors, hidden)
            shapes[f"{at}.self_attention.linear_{name}.bias"] = factors
        shapes |= _linear(f"{at}.self_attention.linear_proj", hidden, inner)
        shapes |= _linear(f"{at}.mlp.linear_fc1", ffn, hidden)
        shapes |= _linear(f"{at}.mlp.linear_fc2", hidden, ffn)
        for name in norms:
            shapes |= _norm(f"{at}.{name}", hidden)
    return {key: Canonical(shape) for key, shape in shapes.items()}


def norm_at(name: str, config: Any) -> dict[str, Canonical]:
    """The canonical tensors of a norm outside of the layers."""
    return {key: Canonical(shape) for key, shape in _norm(name, config.hidden_size).items()}


def linear_at(name: str, rows: int, columns: int) -> dict[str, Canonical]:
    """The canonical tensors of a linear layer that not every model has."""
    return {key: Canonical(s, "optional") for key, s in _linear(name, rows, columns).items()}


def masked_head(config: Any) -> dict[str, Canonical]:
    """The canonical tensors of the head for masked tokens, which a body alone has not."""
    size, hidden = config.vocab_size, config.hidden_size
    shapes: dict[str, Dims] = {
        **_linear("lm_head.dense", hidden, hidden),
        **_norm("lm_head.layer_norm", hidden),
        "output_layer.bias": (size,),
    }
    if not config.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (size, hidden)
    return {key: Canonical(shape, "optional") for key, shape in shapes.items()}


def table(config: Any, shapes: Mapping[str, Dims], norms: tuple[str, str]) -> list[Rule]:
    """Megatron-Core's names and layouts, to the canonical space."""
    inside = transformer(config, "encoder", gated=False)
    if norms == AFTER:
        inside = [rule for rule in inside if "layernorm." not in rule.parts[0].to]
        pairs = [
            both(rule) for name in AFTER for rule in norm(f"{LAYER}.*.{name}.", f"{LAYER}.*.{name}")
        ]
        inside += [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs)]
    heads = ("lm_head.dense", "lm_head.layer_norm", "pooler.dense", "binary_head")
    names = (POSITION, TYPE, *(f"{head}.{kind}" for head in heads for kind in KINDS))
    return [
        *embeddings(config, shapes),
        vocab("output_layer.bias", "output_layer.bias", config, shapes),
        *(rename(name, name) for name in names),
        *norm(f"{_FIRST}.", _FIRST),
        *inside,
    ]


def older(config: Any, shapes: Mapping[str, Dims]) -> Iterator[Rule]:
    """What NeMo 1 called the same tensors before it built its models with Megatron-Core."""
    tied = config.share_embeddings_and_output_weights
    yield vocab(f"{_FRONT}{WORD}", WORD, config, shapes)
    yield vocab("lm_head.weight", WORD if tied else "output_layer.weight", config, shapes)
    yield vocab("lm_head.bias", "output_layer.bias", config, shapes)
    for kind in KINDS:
        yield rename(f"lm_head.layernorm.{kind}", f"lm_head.layer_norm.{kind}")
        yield rename(f"{_FRONT}pooler.dense.{kind}", f"pooler.dense.{kind}")
        name = f"encoder.final_layernorm.{kind}"
        yield rename(f"{_FRONT}{name}", name)
    for name in (POSITION, TYPE):
        yield rename(f"{_FRONT}{name}", name)
    for rule in transformer(config, "encoder", gated=False):
        spelled = rule.pattern_text
        if spelled.startswith(f"{LAYER}.*.") and ".layer_norm_" not in spelled:
            for now, before in _OLDER:
                spelled = spelled.replace(now, before)
            yield dataclasses.replace(rule, pattern_text=f"{_FRONT}{spelled}")
    yield dropped(f"{_FRONT}rotary_pos_emb.inv_freq", "computed from the config")


def masked_lines(tied: bool) -> tuple[Line, ...]:
    """The head for masked tokens of a BERT of transformers, whose bias it keeps under two names."""
    at = "cls.predictions"
    output = tuple(
        Line(f"{at}.decoder.{kind}", f"output_layer.{kind}", is_body=False) for kind in KINDS
    )
    # Nothing reads the outer bias where it is not tied to the one that is added.
    bias = Line(f"{at}.bias", "output_layer.bias" if tied else OUTER_BIAS, False, zero=not tied)
    return (
        *linear(f"{at}.transform.dense", "lm_head.dense", is_body=False),
        *hf_norm(f"{at}.transform.LayerNorm", "lm_head.layer_norm", is_body=False),
        *((bias, *output) if tied else (*output, bias)),
        *linear("cls.seq_relationship", "binary_head", is_body=False),
        *linear("classifier", "classifier", is_body=False),
        *linear("qa_outputs", "qa_outputs", is_body=False),
    )


def position_ids(config: Any) -> tuple[Rule, ...]:
    """Older checkpoints of transformers store them: the numbers from 0 on."""
    name, why = "embeddings.position_ids", "the numbers from 0 on"
    return tuple(dropped(f"{front}{name}", why) for front in ("", "bert.", "esm."))


def bert_heads(config: Any) -> dict[str, Canonical]:
    """The canonical tensors of a BERT's heads and pooler."""
    hidden = config.hidden_size
    found = {
        **linear_at("pooler.dense", hidden, hidden),
        **masked_head(config),
        **linear_at("binary_head", 2, hidden),
    }
    if not config.share_embeddings_and_output_weights:
        found[OUTER_BIAS] = Canonical((config.vocab_size,), "zero")
    return found


def own_heads() -> Iterator[Rule]:
    """Heads for one task that BioNeMo puts on an encoder, which transformers has no model for."""
    for task in ("regression", "classification"):
        yield dropped(f"{task}_head.**", "a head of BioNeMo's own", is_loss=True)


def spells_before(stored: Collection[str], *, learned: bool) -> bool:
    """Whether names are of an encoder with norms before, positions ``learned`` or computed."""
    is_older = any(key.endswith(".self_attention.query_key_value.weight") for key in stored)
    return (
        (is_older or _is_tree(stored))
        and not spells_after(stored)
        and any(key.endswith(POSITION) for key in stored) is learned
    )


def spells_after(stored: Collection[str]) -> bool:
    """Whether names are of an encoder of NeMo with norms after."""
    return any(f".{AFTER[0]}." in key for key in stored) and _is_tree(stored)


def _linear(name: str, rows: int, columns: int) -> dict[str, Dims]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, size: int) -> dict[str, Dims]:
    return {f"{name}.{kind}": (size,) for kind in KINDS}
