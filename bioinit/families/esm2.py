"""ESM-2: protein language models, with config fields and tensors under the field's own names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from bioinit.backends.transformers import named
from bioinit.backends.transformers.named import Heads, Line, Translation, linear, norm
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.errors import ConfigError
from bioinit.families._named import hf, named_family
from bioinit.families.protocol import Canonical

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
    return {}


FAMILY = named_family(
    Esm2Config,
    TRANSLATION,
    {
        "hf": hf(
            TRANSLATION,
            _lines,
            (
                "encoder.emb_layer_norm_after.weight",
                "attention.self.rotary_embeddings.inv_freq",
            ),
            lambda config: Heads(config.num_attention_heads, 1, config.kv_channels),
        )
    },
    _tensors,
)
