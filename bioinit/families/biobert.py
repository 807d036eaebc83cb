"""Megatron's BERT, which normalizes before attention and MLP: BioNeMo's BioBERT and Geneformer.

Its home in transformers is ``MegatronBert``. BERT itself normalizes after them (the family
``bert``), and no renaming makes one the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from bioinit.backends import megatron
from bioinit.backends.transformers import named
from bioinit.backends.transformers.named import Fate, Line, Translation, linear
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.errors import ConfigError
from bioinit.families import _biobert, _bionemo, _encoder, _megatron
from bioinit.families._biobert import TYPES
from bioinit.families._named import hf, named_family
from bioinit.families.protocol import Canonical, Dialect, Written
from bioinit.layout import Dims
from bioinit.record import SavedField
from bioinit.rules import Rule

MODEL_TYPE = "megatron-bert"


class _Translation(Translation):
    """``MegatronBert`` has token types always: one that is zero is what Megatron has without."""

    def read(
        self, data: Mapping[str, Any], where: str
    ) -> tuple[dict[str, SavedField], tuple[Fate, ...]]:
        fields, fates = super().read(data, where)
        if fields[TYPES].value == 1:
            fields[TYPES] = fields[TYPES]._replace(value=0)
        return fields, fates

    def write(self, config: Any) -> dict[str, Any]:
        _check_head(config, "hf")
        found = super().write(config)
        return {**found, "type_vocab_size": max(1, config.num_tokentypes)}


TRANSLATION = _Translation(
    MODEL_TYPE,
    names={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "seq_length",
        "type_vocab_size": TYPES,
        "layer_norm_eps": "layernorm_epsilon",
        "hidden_act": "activation",
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "init_method_std",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
        "pad_token_id": "pad_token_id",
    },
    only={"position_embedding_type": "absolute"},
)


@dataclass(kw_only=True)
class BioBertConfig(TrainableModelConfig):
    """A BERT of Megatron. The defaults are those of a base size; sizes are in ``conf/model``.

    ``num_tokentypes`` of 0 or 1 is a model without token types. ``extra`` holds fields of
    ``config.json`` that only transformers reads.
    """

    architecture: str | None = own("masked_lm")
    vocab_size: int = 29056
    num_layers: int = 12
    hidden_size: int = 768
    ffn_hidden_size: int | None = derived(lambda c: 4 * c.hidden_size)
    num_attention_heads: int = 12
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    seq_length: int = 512
    num_tokentypes: int = 0
    add_binary_head: bool = False
    layernorm_epsilon: float = 1e-12
    activation: str = "gelu"
    lm_head_activation: str | None = derived(lambda c: c.activation)
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_method_std: float = 0.02
    share_embeddings_and_output_weights: bool = True
    make_vocab_size_divisible_by: int = 128
    pad_token_id: int | None = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        named.checked_heads(self)
        TRANSLATION.check_extra(self.extra)
        for name in ("is_decoder", "add_cross_attention"):
            if self.extra.get(name):
                raise ConfigError(
                    f"{name} is set, and the family biobert covers encoders alone. "
                    "Use a recipe of the family auto."
                )

    def configure_model(self) -> nn.Module:
        """Construct the transformers model."""
        return TRANSLATION.construct(self)


_LAYER = "encoder.layer.*"
_TO = "encoder.layers.*"

_BODY: tuple[Line, ...] = (
    Line("embeddings.word_embeddings.weight", _encoder.WORD),
    Line("embeddings.position_embeddings.weight", _encoder.POSITION),
    Line("embeddings.token_type_embeddings.weight", _encoder.TYPE, zero=True),
    *linear(f"{_LAYER}.attention.ln", f"{_TO}.input_layernorm"),
    *linear(f"{_LAYER}.attention.self.query", f"{_TO}.self_attention.linear_q", heads="query"),
    *linear(f"{_LAYER}.attention.self.key", f"{_TO}.self_attention.linear_k", heads="key"),
    *linear(f"{_LAYER}.attention.self.value", f"{_TO}.self_attention.linear_v", heads="key"),
    *linear(f"{_LAYER}.attention.output.dense", f"{_TO}.self_attention.linear_proj"),
    *linear(f"{_LAYER}.ln", f"{_TO}.pre_mlp_layernorm"),
    *linear(f"{_LAYER}.intermediate.dense", f"{_TO}.mlp.linear_fc1"),
    *linear(f"{_LAYER}.output.dense", f"{_TO}.mlp.linear_fc2"),
    *linear("encoder.ln", "encoder.final_layernorm"),
    *linear("pooler.dense", "pooler.dense"),
)


def _lines(config: BioBertConfig) -> tuple[Line, ...]:
    return (*_BODY, *_encoder.masked_lines(config.share_embeddings_and_output_weights))


def _tensors(config: BioBertConfig) -> dict[str, Canonical]:
    hidden, types = config.hidden_size, config.num_tokentypes
    kept: Literal["needed", "zero"] = "needed" if types > 1 else "zero"
    return {
        _encoder.WORD: Canonical((config.vocab_size, hidden)),
        _encoder.POSITION: Canonical((config.seq_length, hidden)),
        _encoder.TYPE: Canonical((max(1, types), hidden), kept),
        **_encoder.encoder(config, _encoder.BEFORE),
        **_encoder.norm_at("encoder.final_layernorm", config),
        **_encoder.bert_heads(config),
    }


def _table(config: TrainableModelConfig, shapes: Mapping[str, Dims], body: str) -> list[Rule]:
    assert isinstance(config, BioBertConfig)
    found = [
        *_encoder.table(config, shapes, _encoder.BEFORE),
        *_encoder.own_heads(),
        *_encoder.older(config, shapes),
    ]
    if config.num_tokentypes > 1:
        return found
    return [rule for rule in found if _encoder.TYPE not in rule.pattern_text]


def _spells(stored: Collection[str]) -> bool:
    return _encoder.spells_before(stored, learned=True)


def _write_nemo2(
    config: TrainableModelConfig, carried: Mapping[str, Any], tokenizer: Collection[str]
) -> Written:
    """BioNeMo's class where it can be, NeMo's for token types and pairs of sequences."""
    assert isinstance(config, BioBertConfig)
    _check_head(config, "nemo2")
    tensors, rules = _tensors(config), _table(config, {}, "")
    if config.num_tokentypes > 1 or config.add_binary_head:
        return _bionemo.written(
            _biobert.NEMO2_BERT,
            config,
            carried,
            tokenizer,
            rules=rules,
            tensors=tensors,
            config_class=f"{_biobert.NEMO}.MegatronBertConfig",
            model_class="nemo.collections.llm.bert.model.base.BertModel",
            more={"add_pooler": config.add_binary_head, "add_lm_head": True},
        )
    return _bionemo.written(
        _biobert.NEMO2,
        config,
        carried,
        tokenizer,
        rules=rules,
        tensors=tensors,
        config_class=_biobert.CLASS,
        arguments=_bionemo.lightning_module(None),
    )


def _check_head(config: BioBertConfig, where: str) -> None:
    """Raise if the head for masked tokens has an activation that it has nowhere in ``where``.

    Raises:
        ConfigError: it has.
    """
    expected = config.activation if where == "hf" else "gelu"
    if config.lm_head_activation != expected and _masked(config):
        raise ConfigError(
            f"BioBertConfig.lm_head_activation is {config.lm_head_activation!r} with activation="
            f"{config.activation!r}, which {where} cannot express: the head for masked tokens has "
            f"{'the activation of the layers' if where == 'hf' else 'gelu'} there. Choose an "
            "architecture without that head, or change the field if it was not trained so."
        )


def _masked(config: BioBertConfig) -> bool:
    ends = ("ForMaskedLM", "ForPreTraining", "ForCausalLM")
    return str(TRANSLATION.model_class(config).__name__).endswith(ends)


def _construct(config: BioBertConfig) -> nn.Module:
    """The ``BertModel`` of Megatron-Core, with its head for masked tokens."""
    if not _masked(config):
        raise ConfigError(
            f"model.architecture={config.architecture!r}, and megatron-core's BERT is a masked "
            "language model with no other head. Set model.architecture=masked_lm, or leave "
            "model.backend out: transformers builds it."
        )
    _check_head(config, "megatron-core")
    return megatron.bert(
        config,
        {"activation_func": config.activation, "normalization": "LayerNorm"},
        vocab_size=_megatron.padded(config.vocab_size, config.make_vocab_size_divisible_by),
        divisor=config.make_vocab_size_divisible_by,
        num_tokentypes=config.num_tokentypes if config.num_tokentypes > 1 else 0,
        add_binary_head=config.add_binary_head,
    )


_HF = hf(
    TRANSLATION,
    _lines,
    ("attention.ln.weight",),
    _megatron.heads_of,
    more=_encoder.position_ids,
)

FAMILY = dataclasses.replace(
    named_family(
        BioBertConfig,
        TRANSLATION,
        {
            "hf": _HF,
            "nemo2": Dialect(
                _table,
                _spells,
                lambda context: _biobert.is_bionemo(context) or _biobert.is_nemo(context),
                _biobert.read_nemo2,
                _write_nemo2,
                _biobert.NEMO2.names,
                says=_biobert.NEMO2.says,
            ),
            "nemo1": Dialect(
                _table,
                _spells,
                _biobert.is_nemo1,
                _biobert.read_nemo1,
                fields=_biobert.NEMO1.names,
                says=_biobert.NEMO1.says,
            ),
            "megatron": Dialect(
                _table,
                _spells,
                _biobert.is_megatron,
                _biobert.read_megatron,
                fields=_biobert.MEGATRON.names,
                says=_biobert.MEGATRON.says,
            ),
        },
        _tensors,
        _construct,
    ),
    apart={"bert": _encoder.APART},
    tensor_parallel=_encoder.TENSOR_PARALLEL,
)
