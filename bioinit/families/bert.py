"""BERT, and what shares its architecture on Hugging Face: BioBERT, Geneformer, MiniLM, ..."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends import transformers as backend
from bioinit.backends.transformers import named
from bioinit.backends.transformers.named import Line, Translation, linear, norm
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families.protocol import Family, ReadFields, SourceField, of_dialect, read_ours
from bioinit.layout import Dims
from bioinit.mapping import Names

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
_MLM = "cls.predictions"

LINES: tuple[Line, ...] = (
    Line("embeddings.word_embeddings.weight", "embedding.word_embeddings.weight"),
    Line("embeddings.position_embeddings.weight", "embedding.position_embeddings.weight"),
    Line("embeddings.token_type_embeddings.weight", "embedding.tokentype_embeddings.weight"),
    *norm("embeddings.LayerNorm", "encoder.initial_layernorm"),
    *linear(f"{_LAYER}.attention.self.query", f"{_TO}.self_attention.linear_q", heads=True),
    *linear(f"{_LAYER}.attention.self.key", f"{_TO}.self_attention.linear_k", heads=True),
    *linear(f"{_LAYER}.attention.self.value", f"{_TO}.self_attention.linear_v", heads=True),
    *linear(f"{_LAYER}.attention.output.dense", f"{_TO}.self_attention.linear_proj"),
    *norm(f"{_LAYER}.attention.output.LayerNorm", f"{_TO}.post_att_layernorm"),
    *linear(f"{_LAYER}.intermediate.dense", f"{_TO}.mlp.linear_fc1"),
    *linear(f"{_LAYER}.output.dense", f"{_TO}.mlp.linear_fc2"),
    *norm(f"{_LAYER}.output.LayerNorm", f"{_TO}.post_mlp_layernorm"),
    *linear("pooler.dense", "pooler.dense"),
    *linear(f"{_MLM}.transform.dense", "lm_head.dense", is_body=False),
    *norm(f"{_MLM}.transform.LayerNorm", "lm_head.layer_norm", is_body=False),
    *linear(f"{_MLM}.decoder", "output_layer", is_body=False),
    Line(f"{_MLM}.bias", "lm_head.bias", is_body=False),
    *linear("cls.seq_relationship", "binary_head", is_body=False),
    *linear("classifier", "classifier", is_body=False),
    *linear("qa_outputs", "qa_outputs", is_body=False),
)


def _is_ours(context: Context) -> bool:
    return context.dialect == "bioinit" and str(context.model).startswith(f"{__name__}.")


def _hf(context: Context) -> Context | None:
    """The ``config.json`` of a BERT; the first ones, BioBERT's among them, name no model type."""
    saved = of_dialect(context, "hf")
    if saved is None or saved.model not in (MODEL_TYPE, None):
        return None
    is_bert = saved.model == MODEL_TYPE or {"type_vocab_size", "num_hidden_layers"} <= {*saved.data}
    return saved if is_bert else None


def _recognizes(context: Context) -> bool:
    return _is_ours(context) or _hf(context) is not None


def _read_fields(context: Context) -> ReadFields:
    if _is_ours(context):
        return read_ours(context, BertConfig)
    saved = _hf(context)
    if saved is None:
        raise ConfigError(f"{context.where} describes a {context.model!r}, not a BERT model.")
    fields, fates = TRANSLATION.read(saved.data, saved.where)
    return ReadFields(fields, tuple(SourceField(*fate) for fate in fates))


def _names(
    config: TrainableModelConfig, model: nn.Module, dialect: str, stored: Mapping[str, Dims]
) -> Names:
    assert isinstance(config, BertConfig)
    return named.names(LINES, model, stored, config.num_attention_heads)


def _dialect_of(stored: Iterable[str]) -> str | None:
    marks = ("embeddings.token_type_embeddings.weight",)
    return "hf" if any(key.endswith(marks) for key in stored) else None


FAMILY = Family(
    config=BertConfig,
    recognizes=_recognizes,
    config_for=lambda context: BertConfig,
    read_fields=_read_fields,
    build=lambda config: config.configure_model(),
    backend=lambda config: backend.BACKEND,
    names=_names,
    dialect_of=_dialect_of,
)
