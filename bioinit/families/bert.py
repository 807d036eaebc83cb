"""BERT, and what shares its architecture on Hugging Face: BioBERT, Geneformer, MiniLM, ..."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends.transformers import named
from bioinit.backends.transformers.named import Heads, Line, Translation, linear, norm
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families._named import hf, named_family
from bioinit.families.protocol import Canonical

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
    *linear(f"{_LAYER}.attention.self.query", f"{_TO}.self_attention.linear_q", heads="query"),
    *linear(f"{_LAYER}.attention.self.key", f"{_TO}.self_attention.linear_k", heads="key"),
    *linear(f"{_LAYER}.attention.self.value", f"{_TO}.self_attention.linear_v", heads="key"),
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


def _is_bert(context: Context) -> bool:
    """The ``config.json`` of a BERT; the first ones, BioBERT's among them, name no model type."""
    if context.model == MODEL_TYPE:
        return True
    return context.model is None and {"type_vocab_size", "num_hidden_layers"} <= {*context.data}


def _tensors(config: BertConfig) -> dict[str, Canonical]:
    return {}


FAMILY = named_family(
    BertConfig,
    TRANSLATION,
    {
        "hf": hf(
            TRANSLATION,
            lambda config: LINES,
            ("embeddings.token_type_embeddings.weight",),
            lambda config: Heads(config.num_attention_heads, 1, config.kv_channels),
            _is_bert,
        )
    },
    _tensors,
)
