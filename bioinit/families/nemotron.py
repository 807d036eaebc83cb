"""Nemotron 3 and 4: decoders with squared ReLU and no gate, and rotary positions in half of a head.

Layer norms have a bias, and weights around zero (``LayerNorm1P``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends.transformers.named import Translation
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.errors import ConfigError
from bioinit.families import _decoder, _megatron
from bioinit.families._gpt import Gpt
from bioinit.families._kinds import Kind
from bioinit.families._live import gpt
from bioinit.families._named import hf, named_family
from bioinit.families.protocol import Canonical

TRANSLATION = Translation(
    "nemotron",
    names={
        **{name: ours for name, ours in _decoder.FIELDS.items() if name != "rms_norm_eps"},
        "norm_eps": "layernorm_epsilon",
        "rope_parameters.partial_rotary_factor": "rotary_percent",
        "attention_bias": "add_attention_bias",
        "mlp_bias": "add_mlp_bias",
    },
)


@dataclass(kw_only=True)
class NemotronConfig(TrainableModelConfig):
    """A Nemotron model. The defaults are those of Nemotron 3 8B; sizes are in ``conf/model``.

    ``layernorm_zero_centered_gamma`` says how a checkpoint stores norms, and shapes no model.
    ``extra`` holds fields of ``config.json`` that only transformers reads.
    """

    architecture: str | None = own("causal_lm")
    vocab_size: int = 256000
    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 16384
    num_attention_heads: int = 32
    num_query_groups: int | None = derived(lambda c: c.num_attention_heads)
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    activation_func: str = "relu2"
    seq_length: int = 4096
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = True
    init_method_std: float = 0.01
    attention_dropout: float = 0.0
    add_attention_bias: bool = False
    add_mlp_bias: bool = False
    share_embeddings_and_output_weights: bool = False
    rotary_percent: float = 0.5
    rotary_base: float = 10000.0
    rope_type: str = "default"
    scale_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    old_context_len: int | None = None
    make_vocab_size_divisible_by: int | None = derived(lambda c: _decoder.divisor(c.vocab_size))
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _decoder.check_heads(self)
        TRANSLATION.check_extra(self.extra)

    def configure_model(self) -> nn.Module:
        """Construct the transformers model."""
        return TRANSLATION.construct(self)


def _tensors(config: NemotronConfig) -> dict[str, Canonical]:
    return _decoder.tensors(
        config,
        gated=False,
        norm_bias=True,
        qkv_bias=config.add_attention_bias,
        proj_bias=config.add_attention_bias,
        mlp_bias=config.add_mlp_bias,
    )


def _is_nemotron(kind: Kind) -> bool:
    return kind == Kind("LayerNorm", gated=False, activation="relu2", rotary=True)


def _megatron_model(config: NemotronConfig) -> nn.Module:
    if config.add_attention_bias != config.add_mlp_bias:
        raise ConfigError(
            f"add_attention_bias={config.add_attention_bias} and add_mlp_bias="
            f"{config.add_mlp_bias}, and megatron-core has one switch for both. Leave "
            "model.backend out: transformers builds it."
        )
    fields = {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "layernorm_zero_centered_gamma": config.layernorm_zero_centered_gamma,
        "add_bias_linear": config.add_mlp_bias,
    }
    return gpt(config, TRANSLATION, fields, rotary_percent=config.rotary_percent)


def _sized(layers: int, hidden: int, heads: int, ffn: int, std: float, **more: Any) -> Any:
    return {
        **_PLAIN,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_hidden_size": ffn,
        "init_method_std": std,
        **more,
    }


_AT = "nemo.collections.llm.gpt.model.nemotron"
_PLAIN: dict[str, Any] = {
    "normalization": "LayerNorm",
    "activation_func": "nemo.collections.llm.fn.activation.squared_relu",
    "gated_linear_unit": False,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "seq_length": 4096,
    "rotary_percent": 0.5,
    "attention_dropout": 0.0,
    "layernorm_zero_centered_gamma": True,
    "init_method_std": 0.01,
    "share_embeddings_and_output_weights": False,
}
_4B = _sized(32, 3072, 24, 9216, 0.0134, kv_channels=128, num_query_groups=8)

CLASSES: dict[str, dict[str, Any]] = {
    "NemotronConfig": _PLAIN,
    "Nemotron3Config4B": _4B,
    "Nemotron3Config8B": _sized(32, 4096, 32, 16384, 0.01),
    "Nemotron3Config22B": _sized(40, 6144, 48, 24576, 0.008),
    "Nemotron4Config22B": _sized(40, 6144, 48, 24576, 0.008),
    "Nemotron4Config15B": _sized(32, 6144, 48, 24576, 0.0134, num_query_groups=8),
    "Nemotron4Config340B": _sized(96, 18432, 96, 73728, 0.0063, num_query_groups=8),
}
"""NeMo 2's classes, and what each sets."""

BRIDGE: dict[str, dict[str, Any]] = {
    **{name.replace("Config", "ModelProvider"): sets for name, sets in CLASSES.items()},
    "NemotronModelProvider": _4B,
    # Not as in NeMo 2: Bridge takes these from the model that was published.
    "Nemotron3ModelProvider8B": _sized(
        32, 4096, 48, 16384, 0.01, kv_channels=128, num_query_groups=8
    ),
}

GPT = Gpt(
    tensors=_tensors,
    gated=False,
    normalization="LayerNorm",
    fits=_is_nemotron,
    at=_AT,
    classes=CLASSES,
    model=f"{_AT}.NemotronModel",
    at_bridge="megatron.bridge.models.nemotron.nemotron_provider",
    bridge=BRIDGE,
    config_class=lambda config: f"{_AT}.NemotronConfig",
    is_zero_centered=True,
    has_biases="all",
    names={
        "nemo2": {"rotary_percent": "rotary_percent"},
        "nemo1": {"rotary_percentage": "rotary_percent"},
        "megatron": {"rotary_percent": "rotary_percent"},
    },
)

FAMILY = named_family(
    NemotronConfig,
    TRANSLATION,
    {
        "hf": hf(
            TRANSLATION,
            lambda config: _decoder.lines(gated=False),
            ("self_attn.q_proj.weight",),
            _megatron.heads_of,
            more=_decoder.computed,
        ),
        **GPT.dialects(),
    },
    _tensors,
    megatron=_megatron_model,
)
