"""ESM-2: protein language models, with config fields and tensors under the field's own names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from bioinit.backends.transformers import named
from bioinit.backends.transformers.named import Line, Translation, linear, norm
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families import _bionemo, _encoder, _megatron
from bioinit.families._bionemo import fixed
from bioinit.families._fields import World
from bioinit.families._named import hf, named_family
from bioinit.families._nemo2 import Call
from bioinit.families.protocol import Canonical, Dialect, ReadFields, Written
from bioinit.layout import Dims
from bioinit.record import SavedField
from bioinit.rules import Rule, dropped, rename

MODEL_TYPE = "esm"

TRANSLATION = Translation(
    MODEL_TYPE,
    names={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "seq_length",
        "layer_norm_eps": "layernorm_epsilon",
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "init_method_std",
        "position_embedding_type": "position_embedding_type",
        "rope_theta": "rotary_base",
        "token_dropout": "token_dropout",
        "emb_layer_norm_before": "emb_layer_norm_before",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
        "pad_token_id": "pad_token_id",
        "mask_token_id": "mask_token_id",
    },
    only={"hidden_act": "gelu"},
    idle=frozenset({"classifier_dropout", "cls_token_id"}),
    values={"position_embedding_type": {"rotary": "rope", "absolute": "learned_absolute"}},
)


@dataclass(kw_only=True)
class Esm2Config(TrainableModelConfig):
    """An ESM-2 model. The defaults are those of the 650M one; sizes are presets in ``conf/model``.

    ``extra`` holds fields of ``config.json`` that only transformers reads.
    """

    architecture: str | None = own("masked_lm")
    vocab_size: int = 33
    num_layers: int = 33
    hidden_size: int = 1280
    ffn_hidden_size: int | None = derived(lambda c: 4 * c.hidden_size)
    num_attention_heads: int = 20
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    seq_length: int = 1026
    layernorm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: float = 10000.0
    token_dropout: bool | None = True
    emb_layer_norm_before: bool | None = False
    share_embeddings_and_output_weights: bool = True
    make_vocab_size_divisible_by: int = 128
    pad_token_id: int | None = 1
    mask_token_id: int | None = 32
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        named.checked_heads(self)
        TRANSLATION.check_extra(self.extra)
        for name in ("is_folding_model", "is_decoder", "add_cross_attention"):
            if self.extra.get(name):
                raise ConfigError(
                    f"{name} is set, and the family esm2 covers encoders alone. "
                    "Use a recipe of the family auto."
                )

    def configure_model(self) -> nn.Module:
        """Construct the transformers model."""
        return TRANSLATION.construct(self)


_LAYER = "encoder.layer.*"
_TO = "encoder.layers.*"

LINES: tuple[Line, ...] = (
    Line("embeddings.word_embeddings.weight", "embedding.word_embeddings.weight"),
    Line("embeddings.position_embeddings.weight", "embedding.position_embeddings.weight"),
    *norm("embeddings.layer_norm", "encoder.initial_layernorm"),
    *norm(f"{_LAYER}.attention.LayerNorm", f"{_TO}.input_layernorm"),
    *linear(f"{_LAYER}.attention.self.query", f"{_TO}.self_attention.linear_q", heads="query"),
    *linear(f"{_LAYER}.attention.self.key", f"{_TO}.self_attention.linear_k", heads="key"),
    *linear(f"{_LAYER}.attention.self.value", f"{_TO}.self_attention.linear_v", heads="key"),
    *linear(f"{_LAYER}.attention.output.dense", f"{_TO}.self_attention.linear_proj"),
    *norm(f"{_LAYER}.LayerNorm", f"{_TO}.pre_mlp_layernorm"),
    *linear(f"{_LAYER}.intermediate.dense", f"{_TO}.mlp.linear_fc1"),
    *linear(f"{_LAYER}.output.dense", f"{_TO}.mlp.linear_fc2"),
    *norm("encoder.emb_layer_norm_after", "encoder.final_layernorm"),
    Line(
        "rotary_embeddings.inv_freq",
        "rotary_pos_emb.inv_freq",
        # Written by transformers 5 with a star in the name, for all layers at once.
        aliases=(r"encoder.layer.\*.attention.self.rotary_embeddings.inv_freq",),
    ),
    *linear("pooler.dense", "pooler.dense"),
    *linear("contact_head.regression", "contact_head.regression"),
    *linear("lm_head.dense", "lm_head.dense", is_body=False),
    *norm("lm_head.layer_norm", "lm_head.layer_norm", is_body=False),
    Line("lm_head.decoder.weight", "output_layer.weight", is_body=False),
    Line("lm_head.bias", "output_layer.bias", is_body=False),
    *linear("classifier", "classifier", is_body=False),
    *linear("classifier.dense", "classifier.dense", is_body=False),
    *linear("classifier.out_proj", "classifier.out_proj", is_body=False),
)


def _lines(config: Esm2Config) -> tuple[Line, ...]:
    # Older checkpoints repeat the frequencies in every layer.
    per_layer = tuple(
        f"encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"
        for i in range(config.num_layers)
    )
    return tuple(
        line._replace(aliases=(*line.aliases, *per_layer)) if "inv_freq" in line.hf else line
        for line in LINES
    )


def _tensors(config: Esm2Config) -> dict[str, Canonical]:
    hidden, channels = config.hidden_size, config.kv_channels or 0
    is_rotary = config.position_embedding_type == "rope"
    found = {_encoder.WORD: Canonical((config.vocab_size, hidden))}
    if not is_rotary:
        found[_encoder.POSITION] = Canonical((config.seq_length, hidden))
    if config.emb_layer_norm_before:
        found |= _encoder.norm_at("encoder.initial_layernorm", config)
    found |= _encoder.encoder(config, _encoder.BEFORE)
    found |= _encoder.norm_at("encoder.final_layernorm", config)
    if is_rotary:
        found["rotary_pos_emb.inv_freq"] = Canonical((channels // 2,), "computed")
    # Probabilities of contact come from the attention of all heads of all layers.
    attentions = config.num_layers * config.num_attention_heads
    return {
        **found,
        **_encoder.linear_at("pooler.dense", hidden, hidden),
        **_encoder.linear_at("contact_head.regression", 1, attentions),
        **_encoder.masked_head(config),
    }


_CONTACTS = ("contact_head.regression.weight", "contact_head.regression.bias")


def _table(config: TrainableModelConfig, shapes: Mapping[str, Dims], body: str) -> list[Rule]:
    return [
        *_encoder.table(config, shapes, _encoder.BEFORE),
        # BioNeMo's model has no such head. Its loader reads what the model asks for, so that the
        # head can lie in the checkpoint, and is there for whoever needs it.
        *(rename(name, name) for name in _CONTACTS),
        dropped("rotary_pos_emb.inv_freq", "computed from the config"),
        *_encoder.own_heads(),
        *_encoder.older(config, shapes),
    ]


_POSITIONS = "learned positions are counted from another number in either world"
_SCALING = "queries are scaled once, before they are rotated"
_MASKING = "what is padding counts for nothing in the embedding"

NEMO2 = World(
    dialect="nemo2",
    names={
        **_bionemo.SIZES,
        "seq_length": "seq_length",
        "rotary_base": "rotary_base",
        "token_dropout": "token_dropout",
    },
    codecs={"rotary_base": _bionemo.NUMBER},
    only={
        **_bionemo.ONLY,
        "activation_func": fixed("ESM-2 has gelu", *_bionemo.GELU),
        "normalize_attention_scores": fixed(_SCALING, False),
        "position_embedding_type": fixed(_POSITIONS, "rope"),
        "softmax_scale": fixed(_SCALING, None, 1.0),
        "use_attention_mask": fixed(_MASKING, True),
    },
    lacks={
        "position_embedding_type": ("rope",),
        "emb_layer_norm_before": (False, None),
        "pad_token_id": (1,),
        "mask_token_id": (32,),
    },
    ignored=_bionemo.IGNORED,
    defaults={
        "num_layers": 33,
        "hidden_size": 1280,
        "ffn_hidden_size": 4 * 1280,
        "num_attention_heads": 20,
        "seq_length": 1024,
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.02,
        "rotary_base": 10000,
        "token_dropout": True,
        "share_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 128,
    },
)
_MODEL = "bionemo.esm2.model"
_CONFIG = f"{_MODEL}.model.ESM2Config"
_is_esm2 = _bionemo.class_is(
    _CONFIG,
    f"{_MODEL}.model.ESM2GenericConfig",
    f"{_MODEL}.finetune.sequence_model.ESM2FineTuneSeqConfig",
    f"{_MODEL}.finetune.token_model.ESM2FineTuneTokenConfig",
)
_TOKENIZER = "bionemo.esm2.data.tokenizer.BioNeMoESMTokenizer"
_ALPHABET = {"BioNeMoESMTokenizer": 33}


def _spells(stored: Collection[str]) -> bool:
    return _encoder.spells_before(stored, learned=False)


def _read_nemo2(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
    return _bionemo.read(NEMO2, context, shapes or {}, _ALPHABET, _tokens(context))


def _tokens(context: Context) -> dict[str, SavedField]:
    where = f"the alphabet of ESM-2, which {context.where} is about"
    values = {"position_embedding_type": "rope", "pad_token_id": 1, "mask_token_id": 32}
    return {name: SavedField(value, False, where) for name, value in values.items()}


def _write_nemo2(
    config: TrainableModelConfig, carried: Mapping[str, Any], tokenizer: Collection[str]
) -> Written:
    assert isinstance(config, Esm2Config)
    return _bionemo.written(
        NEMO2,
        config,
        carried,
        tokenizer,
        rules=_table(config, {}, ""),
        tensors=_tensors(config),
        config_class=_CONFIG,
        arguments=_bionemo.lightning_module(Call(_TOKENIZER)),
    )


# BioNeMo 1, whose ESM-2nv is a MegatronBertModel of NeMo 1 with parts of its own.
NEMO1 = World(
    dialect="nemo1",
    names={
        **_bionemo.SIZES,
        "max_position_embeddings": "seq_length",
        "rotary_base": "rotary_base",
        "embedding_token_dropout": "token_dropout",
        "mask_token_id": "mask_token_id",
    },
    codecs={"rotary_base": _bionemo.NUMBER},
    only={
        **_bionemo.ONLY1,
        "embedding_use_attention_mask": fixed(_MASKING, True),
        "normalize_attention_scores": fixed(_SCALING, False),
        "position_embedding_type": fixed(_POSITIONS, "rope"),
        "bert_binary_head": fixed("ESM-2 has no head for pairs of sequences", False),
    },
    ignored=_bionemo.IGNORED1,
    defaults={**_bionemo.BERT1, "rotary_base": 10000},
)


def _is_esm2nv(context: Context) -> bool:
    return (
        context.data.get("position_embedding_type") == "rope"
        and "embedding_token_dropout" in context.data
    )


def _read_nemo1(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
    return _bionemo.read(NEMO1, context, shapes or {}, {}, _tokens(context))


_MARKS = ("encoder.emb_layer_norm_after.weight", "attention.self.rotary_embeddings.inv_freq")

FAMILY = named_family(
    Esm2Config,
    TRANSLATION,
    {
        "hf": hf(TRANSLATION, _lines, _MARKS, _megatron.heads_of, more=_encoder.position_ids),
        "nemo2": Dialect(
            _table, _spells, _is_esm2, _read_nemo2, _write_nemo2, NEMO2.names, says=NEMO2.says
        ),
        "nemo1": Dialect(
            _table, _spells, _is_esm2nv, _read_nemo1, fields=NEMO1.names, says=NEMO1.says
        ),
    },
    _tensors,
    absent={
        "megatron": "megatron-core's BERT does not scale embeddings by the share of masked tokens "
        "(token_dropout), as ESM-2 does"
    },
    tensor_parallel=_encoder.TENSOR_PARALLEL,
)
