"""BERT, and what shares its architecture on Hugging Face: BioBERT, Geneformer, MiniLM, ..."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends.transformers import named
from bioinit.backends.transformers.named import Line, Translation, linear, norm
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families import _bionemo, _encoder, _megatron
from bioinit.families._bionemo import fixed
from bioinit.families._fields import Only, World
from bioinit.families._named import hf, named_family
from bioinit.families.protocol import Canonical, Dialect, ReadFields, Written
from bioinit.layout import Dims
from bioinit.rules import Rule

MODEL_TYPE = "bert"

TRANSLATION = Translation(
    MODEL_TYPE,
    names={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "seq_length",
        "type_vocab_size": "num_tokentypes",
        "layer_norm_eps": "layernorm_epsilon",
        "hidden_act": "activation",
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "classifier_dropout",
        "initializer_range": "init_method_std",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
        "pad_token_id": "pad_token_id",
    },
    only={"position_embedding_type": "absolute"},
    idle=frozenset(
        {
            "directionality",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        }
    ),
)


@dataclass(kw_only=True)
class BertConfig(TrainableModelConfig):
    """A BERT model. The defaults are those of BERT base; sizes are presets in ``conf/model``.

    ``extra`` holds fields of ``config.json`` that only transformers reads.
    """

    architecture: str | None = own("masked_lm")
    vocab_size: int = 30522
    num_layers: int = 12
    hidden_size: int = 768
    ffn_hidden_size: int | None = derived(lambda c: 4 * c.hidden_size)
    num_attention_heads: int = 12
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    seq_length: int = 512
    num_tokentypes: int = 2
    layernorm_epsilon: float = 1e-12
    activation: str = "gelu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None
    init_method_std: float = 0.02
    share_embeddings_and_output_weights: bool = True
    make_vocab_size_divisible_by: int = 128
    pad_token_id: int | None = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        named.checked_heads(self)
        TRANSLATION.check_extra(self.extra)
        if self.extra.get("add_cross_attention"):
            raise ConfigError(
                "add_cross_attention is set, and the family bert covers encoders alone. "
                "Use a recipe of the family auto."
            )

    def configure_model(self) -> nn.Module:
        """Construct the transformers model."""
        return TRANSLATION.construct(self)


_LAYER = "encoder.layer.*"
_TO = "encoder.layers.*"

_BODY: tuple[Line, ...] = (
    Line("embeddings.word_embeddings.weight", "embedding.word_embeddings.weight"),
    Line("embeddings.position_embeddings.weight", "embedding.position_embeddings.weight"),
    Line("embeddings.token_type_embeddings.weight", "embedding.tokentype_embeddings.weight"),
    *norm("embeddings.LayerNorm", "encoder.initial_layernorm"),
    *linear(f"{_LAYER}.attention.self.query", f"{_TO}.self_attention.linear_q", heads="query"),
    *linear(f"{_LAYER}.attention.self.key", f"{_TO}.self_attention.linear_k", heads="key"),
    *linear(f"{_LAYER}.attention.self.value", f"{_TO}.self_attention.linear_v", heads="key"),
    *linear(f"{_LAYER}.attention.output.dense", f"{_TO}.self_attention.linear_proj"),
    *norm(f"{_LAYER}.attention.output.LayerNorm", f"{_TO}.post_att_layernorm"),
    *linear(f"{_LAYER}.intermediate.dense", f"{_TO}.mlp.linear_fc1"),
    *linear(f"{_LAYER}.output.dense", f"{_TO}.mlp.linear_fc2"),
    *norm(f"{_LAYER}.output.LayerNorm", f"{_TO}.post_mlp_layernorm"),
    *linear("pooler.dense", "pooler.dense"),
)


def _is_bert(context: Context) -> bool:
    """The ``config.json`` of a BERT; the first ones, BioBERT's among them, name no model type."""
    if context.model == MODEL_TYPE:
        return True
    return context.model is None and {"type_vocab_size", "num_hidden_layers"} <= {*context.data}


def _lines(config: BertConfig) -> tuple[Line, ...]:
    return (*_BODY, *_encoder.masked_lines(config.share_embeddings_and_output_weights))


def _tensors(config: BertConfig) -> dict[str, Canonical]:
    hidden = config.hidden_size
    return {
        _encoder.WORD: Canonical((config.vocab_size, hidden)),
        _encoder.POSITION: Canonical((config.seq_length, hidden)),
        _encoder.TYPE: Canonical((config.num_tokentypes, hidden)),
        **_encoder.norm_at("encoder.initial_layernorm", config),
        **_encoder.encoder(config, _encoder.AFTER),
        **_encoder.bert_heads(config),
    }


def _table(config: TrainableModelConfig, shapes: Mapping[str, Dims], body: str) -> list[Rule]:
    return _encoder.table(config, shapes, _encoder.AFTER)


_KIND = "this family normalizes after attention and MLP, as BERT does (post-layer-norm)"
_TENSORS = "the tensors that are stored say it"

# NeMo's spec for BERT as it is on Hugging Face.
NEMO2 = World(
    dialect="nemo2",
    names={
        **_bionemo.SIZES,
        "seq_length": "seq_length",
        "num_tokentypes": "num_tokentypes",
    },
    only={
        **_bionemo.ONLY,
        "activation_func": fixed("NeMo's head for masked tokens has gelu", *_bionemo.GELU),
        "bert_type": Only(("huggingface",), _KIND),
        "position_embedding_type": fixed("a BERT learns its positions", "learned_absolute"),
        "softmax_scale": fixed("scores are scaled by the size of a head", None),
    },
    lacks={"activation": ("gelu",)},
    ignored=ChainMap(
        {**dict.fromkeys(("add_pooler", "add_lm_head", "bert_binary_head"), _TENSORS)},
        {**_bionemo.NO_ROTARY, "transformer_block_type": _KIND},
        _bionemo.IGNORED,  # type: ignore[arg-type]
    ),
    defaults={
        "seq_length": 512,
        "num_tokentypes": 2,
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "init_method_std": 0.02,
        "share_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 128,
    },
)
_MODEL = "nemo.collections.llm.bert.model"
_CLASS = f"{_MODEL}.bert.HuggingFaceBertConfig"


def _read_nemo2(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
    return _bionemo.read(
        NEMO2, context, shapes or {}, defaults=_bionemo.size_of(_bionemo.class_of(context))
    )


def _write_nemo2(
    config: TrainableModelConfig, carried: Mapping[str, Any], tokenizer: Collection[str]
) -> Written:
    assert isinstance(config, BertConfig)
    kind = TRANSLATION.model_class(config).__name__
    has_pair, has_tokens = kind in _PAIRS, kind in _TOKENS
    return _bionemo.written(
        NEMO2,
        config,
        carried,
        tokenizer,
        rules=_table(config, {}, ""),
        tensors=_tensors(config),
        config_class=_CLASS,
        model_class=f"{_MODEL}.bert.HuggingFaceBertModel",
        more={
            "add_lm_head": has_tokens,
            "bert_binary_head": has_pair,
            "add_pooler": has_pair or kind == "BertModel",
        },
    )


_PAIRS = ("BertForPreTraining", "BertForNextSentencePrediction")
_TOKENS = ("BertForPreTraining", "BertForMaskedLM", "BertLMHeadModel")
_MARKS = ("attention.output.LayerNorm.weight", "attention.output.LayerNorm.gamma")

FAMILY = dataclasses.replace(
    named_family(
        BertConfig,
        TRANSLATION,
        {
            "hf": hf(
                TRANSLATION, _lines, _MARKS, _megatron.heads_of, _is_bert, _encoder.position_ids
            ),
            "nemo2": Dialect(
                _table,
                _encoder.spells_after,
                _bionemo.is_nemo_bert("huggingface"),
                _read_nemo2,
                _write_nemo2,
                NEMO2.names,
                says=NEMO2.says,
            ),
        },
        _tensors,
        absent={"megatron": "megatron-core's BERT normalizes before attention and MLP, not after"},
    ),
    apart={"biobert": _encoder.APART},
    tensor_parallel=_encoder.TENSOR_PARALLEL,
)
