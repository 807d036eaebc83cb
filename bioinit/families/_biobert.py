"""Saved configs of Megatron's BERT, in the worlds that keep one: which field is which of ours."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from bioinit.contexts.protocol import Context
from bioinit.families import _bionemo
from bioinit.families._bionemo import fixed
from bioinit.families._fields import Only, World
from bioinit.families.protocol import ReadFields
from bioinit.layout import Dims
from bioinit.record import SavedField

TYPES = "num_tokentypes"

_LEARNED = "this family learns its positions"
_SCALING = "scores are scaled by the size of a head"
_HEAD = "the head for masked tokens of every model of Megatron"

NEMO2 = World(
    dialect="nemo2",
    names={**_bionemo.SIZES, "seq_length": "seq_length", "activation_func": "activation"},
    codecs={"activation": _bionemo.ACTIVATION},
    only={
        **_bionemo.ONLY,
        "position_embedding_type": fixed(_LEARNED, "learned_absolute"),
        "softmax_scale": fixed(_SCALING, None),
        "include_gene_embeddings": fixed("this family has no embedding of genes", False),
    },
    ignored=ChainMap(dict(_bionemo.NO_ROTARY), _bionemo.IGNORED),  # type: ignore[arg-type]
    defaults={
        "num_layers": 6,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "seq_length": 1024,
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "init_method_std": 0.02,
        "activation_func": _bionemo.GELU[0],
        "share_embeddings_and_output_weights": False,
        "make_vocab_size_divisible_by": 128,
    },
)
_GENEFORMER = {
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 4,
    "seq_length": 2048,
    "layernorm_epsilon": 1e-12,
    "hidden_dropout": 0.02,
    "share_embeddings_and_output_weights": True,
}
CLASS = "bionemo.geneformer.api.GeneformerConfig"
is_bionemo = _bionemo.class_is(
    CLASS,
    "bionemo.llm.model.biobert.model.BioBertConfig",
    "bionemo.geneformer.model.finetune_token_regressor.FineTuneSeqLenBioBertConfig",
)
_TENSORS = "the tensors that are stored say it"
_KIND = "this family normalizes before attention and MLP, as Megatron does (pre-layer-norm)"

# NeMo's own BERT, of which Megatron's is one kind.
NEMO2_BERT = World(
    dialect="nemo2",
    names={**NEMO2.names, TYPES: TYPES, "bert_binary_head": "add_binary_head"},
    codecs=NEMO2.codecs,
    only={**NEMO2.only, "bert_type": Only(("megatron",), _KIND)},
    ignored=ChainMap(
        {**dict.fromkeys(("add_pooler", "add_lm_head"), _TENSORS), "transformer_block_type": _KIND},
        NEMO2.ignored,  # type: ignore[arg-type]
    ),
    defaults={
        **NEMO2.defaults,
        "seq_length": 512,
        "bert_binary_head": False,
        "share_embeddings_and_output_weights": True,
    },
)
NEMO = "nemo.collections.llm.bert.model.bert"
is_nemo = _bionemo.is_nemo_bert("megatron")


def _gelu(context: Context) -> dict[str, SavedField]:
    return {"lm_head_activation": SavedField("gelu", False, f"{context.where}: {_HEAD}")}


def _types(context: Context, default: bool) -> dict[str, SavedField]:
    """Two token types go with the head for pairs, where nothing else is said."""
    has_pairs = context.data.get("bert_binary_head", default)
    where = f"{context.where}: bert_binary_head"
    return {**_gelu(context), TYPES: SavedField(2 if has_pairs else 0, False, where)}


def read_nemo2(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
    shapes, name = shapes or {}, _bionemo.class_of(context)
    if is_nemo(context):
        more, sizes = _types(context, False), _bionemo.size_of(name)
        return _bionemo.read(NEMO2_BERT, context, shapes, more=more, defaults=sizes)
    defaults: Mapping[str, Any] = _GENEFORMER if name == "GeneformerConfig" else {}
    return _bionemo.read(NEMO2, context, shapes, more=_gelu(context), defaults=defaults)


NEMO1 = World(
    dialect="nemo1",
    names={
        **_bionemo.SIZES,
        "max_position_embeddings": "seq_length",
        "bert_binary_head": "add_binary_head",
    },
    only={
        **_bionemo.ONLY1,
        "normalize_attention_scores": fixed(_SCALING, True),
        "position_embedding_type": fixed(_LEARNED, "learned_absolute"),
    },
    ignored=ChainMap(dict(_bionemo.NO_ROTARY), _bionemo.IGNORED1),  # type: ignore[arg-type]
    defaults={**_bionemo.BERT1, "bert_binary_head": True},
)
"""NeMo 1's MegatronBertModel, of which BioNeMo 1's Geneformer and ESM-1nv are kinds."""


def is_nemo1(context: Context) -> bool:
    kind = (context.model or "").rpartition(".")[2]
    named = kind.endswith("BertModel") or kind.startswith(("ESM1nv", "Geneformer"))
    positions = context.data.get("position_embedding_type", "learned_absolute")
    return (named or "bert_binary_head" in context.data) and positions == "learned_absolute"


def read_nemo1(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
    return _bionemo.read(NEMO1, context, shapes or {}, more=_types(context, True))


MEGATRON = World(
    dialect="megatron",
    names={
        "num_layers": "num_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "kv_channels": "kv_channels",
        "max_position_embeddings": "seq_length",
        "norm_epsilon": "layernorm_epsilon",
        "hidden_dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "init_method_std": "init_method_std",
        "make_vocab_size_divisible_by": "make_vocab_size_divisible_by",
        "bert_binary_head": "add_binary_head",
        "untie_embeddings_and_output_weights": "share_embeddings_and_output_weights",
    },
    codecs={
        "share_embeddings_and_output_weights": (lambda untied: not untied, lambda tied: not tied)
    },
    only={
        "add_bias_linear": _bionemo.ONLY["add_bias_linear"],
        "apply_layernorm_1p": fixed("norms of a BERT are stored as they are", False),
        "apply_residual_connection_post_layernorm": fixed(
            "residuals are taken before the norm", False
        ),
        "normalization": _bionemo.ONLY["normalization"],
        "num_experts": fixed("a BERT has no experts", None),
        "openai_gelu": fixed("the gelu of a BERT is the exact one", False),
        "position_embedding_type": fixed(_LEARNED, "learned_absolute"),
        "qk_layernorm": _bionemo.ONLY["qk_layernorm"],
        "squared_relu": fixed("a BERT of Megatron-LM has gelu", False),
        "swiglu": fixed("the MLP of a BERT has no gate", False),
    },
    defaults={**_bionemo.BERT1, "norm_epsilon": 1e-5, "bert_binary_head": True},
    rest="an argument of the run that shapes no part of this model",
)
"""The arguments of Megatron-LM's ``pretrain_bert.py``."""


def is_megatron(context: Context) -> bool:
    return str(context.data.get("tokenizer_type")).startswith("BertWordPiece")


def read_megatron(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
    return _bionemo.read(MEGATRON, context, shapes or {}, more=_types(context, True))
