"""Gemma 2: Gemma with two more norms per layer, bounds for scores, windows in every other layer.

Norms are stored as in :mod:`bioinit.families.gemma`. Which layers have a window is no field in
Megatron's worlds: it is every other one. Megatron-Core itself has no such model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends.transformers.named import Line, Translation, linear
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.errors import ConfigError
from bioinit.families import _decoder, _megatron
from bioinit.families._fields import Joint, Only
from bioinit.families._gpt import Gpt
from bioinit.families._kinds import Kind
from bioinit.families._named import hf, named_family
from bioinit.families._worlds import WINDOW
from bioinit.families.protocol import Canonical
from bioinit.rules import Rule

_CAPS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")

TRANSLATION = Translation(
    "gemma2",
    names={
        **{name: ours for name, ours in _decoder.FIELDS.items() if name != "hidden_act"},
        **{name: name for name in _CAPS},
        "hidden_activation": "activation_func",
        "attention_bias": "add_attention_bias",
        "sliding_window": "window_size",
    },
)


@dataclass(kw_only=True)
class Gemma2Config(TrainableModelConfig):
    """A Gemma 2 model. The defaults are those of Gemma 2 2B; sizes are presets in ``conf/model``.

    ``layernorm_zero_centered_gamma`` says how a checkpoint stores norms, and shapes no model.
    ``extra`` holds fields of ``config.json`` that only transformers reads, and ``layer_types``.
    """

    architecture: str | None = own("causal_lm")
    vocab_size: int = 256000
    num_layers: int = 26
    hidden_size: int = 2304
    ffn_hidden_size: int = 9216
    num_attention_heads: int = 8
    num_query_groups: int | None = 4
    kv_channels: int | None = 256
    activation_func: str = "gelu_pytorch_tanh"
    seq_length: int = 8192
    window_size: int | None = 4096
    query_pre_attn_scalar: int = 256
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    layernorm_epsilon: float = 1e-6
    layernorm_zero_centered_gamma: bool = True
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    add_attention_bias: bool = False
    share_embeddings_and_output_weights: bool = True
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


_LAYER = "layers.*"
_TO = "decoder.layers.*"
_AFTER = ("self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm")
"""The norms behind attention and MLP, as NeMo calls them."""


def _lines(config: Gemma2Config) -> tuple[Line, ...]:
    named = {
        f"{_LAYER}.post_attention_layernorm": f"{_TO}.{_AFTER[0]}",
        f"{_LAYER}.post_feedforward_layernorm": f"{_TO}.{_AFTER[1]}",
        f"{_LAYER}.pre_feedforward_layernorm": f"{_TO}.pre_mlp_layernorm",
    }
    plain = f"{_LAYER}.post_attention_layernorm."
    shared = (line for line in _decoder.lines() if not line.hf.startswith(plain))
    return (*shared, *(line for hf, to in named.items() for line in linear(hf, to)))


def _tensors(config: Gemma2Config) -> dict[str, Canonical]:
    bias = config.add_attention_bias
    found = _decoder.tensors(config, qkv_bias=bias, proj_bias=bias)
    for number in range(config.num_layers):
        for name in _AFTER:
            key = f"decoder.layers.{number}.{name}.weight"
            found[key] = Canonical((config.hidden_size,))
    return found


def _after(config: Any, add: float) -> list[Rule]:
    return [
        rule
        for name in _AFTER
        for rule in _megatron.norm(f"{_TO}.{name}.", f"{_TO}.{name}", add=add)
    ]


def _is_gemma2(kind: Kind) -> bool:
    return kind.norm == "RMSNorm" and kind.gated and kind.capped and not kind.experts


def _alternating(config: Any) -> bool:
    types = config.extra.get("layer_types")
    usual = tuple(
        "full_attention" if number % 2 else "sliding_attention"
        for number in range(config.num_layers)
    )
    return types is None or tuple(types) == usual


def _megatron_model(config: Gemma2Config) -> nn.Module:
    raise ConfigError(
        "model.backend='megatron', and megatron-core has no attention that keeps its scores within "
        "bounds, as Gemma 2's does. Leave model.backend out: transformers builds it."
    )


def _check(config: Gemma2Config) -> None:
    if not _alternating(config):
        raise ConfigError(
            f"Gemma2Config.extra.layer_types is {config.extra['layer_types']}, which nemo2 cannot "
            "express: there every other layer has a window, and hf alone can say which. Leave "
            "layer_types out if they alternate."
        )


def _special(values: Mapping[str, Any]) -> dict[str, Any]:
    given = values["mcore_customization_config"] or {}
    return {name: given.get(name) for name in _CAPS if name in given}


_CUSTOM = Joint(("mcore_customization_config",), _CAPS, _special, lambda ours: {})
_AT = "nemo.collections.llm.gpt.model.gemma2"
_PLAIN: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": "nemo.collections.llm.fn.activation.openai_gelu",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "seq_length": 8192,
    "kv_channels": 256,
    "attention_dropout": 0.0,
    "share_embeddings_and_output_weights": True,
    "layernorm_zero_centered_gamma": True,
    "layernorm_epsilon": 1e-6,
    "rotary_base": 10000,
    "window_size": (4096, 0),
    "vocab_size": 256000,
    "query_pre_attn_scalar": 224,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def _sized(layers: int, hidden: int, heads: int, ffn: int, scalar: int, **more: Any) -> Any:
    return {
        **_PLAIN,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads // 2,
        "ffn_hidden_size": ffn,
        "query_pre_attn_scalar": scalar,
        **more,
    }


CLASSES: dict[str, dict[str, Any]] = {
    "Gemma2Config": _PLAIN,
    "Gemma2Config2B": _sized(26, 2304, 8, 9216, 256),
    "Gemma2Config9B": _sized(42, 3584, 16, 14336, 256),
    "Gemma2Config27B": _sized(46, 4608, 32, 36864, 144, kv_channels=128),
}
"""NeMo 2's classes, and what each sets."""

GPT = Gpt(
    tensors=_tensors,
    gated=True,
    normalization="RMSNorm",
    fits=_is_gemma2,
    at=_AT,
    classes=CLASSES,
    model=f"{_AT}.Gemma2Model",
    at_bridge="megatron.bridge.models.gemma.gemma2_provider",
    bridge={name.replace("Config", "ModelProvider"): sets for name, sets in CLASSES.items()},
    config_class=lambda config: f"{_AT}.Gemma2Config",
    is_zero_centered=True,
    writes_vocab_size=True,
    names={
        "nemo2": {**{name: name for name in _CAPS}, "window_size": "window_size"},
        "nemo1": {"window_size": "window_size"},
    },
    joint={"nemo1": (_CUSTOM,)},
    only={"nemo1": {"apply_embedding_scaling": Only((True,), "Gemma's embeddings are scaled")}},
    lacks={"add_attention_bias": (False,)},
    codecs={"window_size": WINDOW},
    norms=_after,
    check=_check,
)

FAMILY = named_family(
    Gemma2Config,
    TRANSLATION,
    {
        "hf": hf(
            TRANSLATION,
            _lines,
            ("pre_feedforward_layernorm.weight",),
            _megatron.heads_of,
            more=_decoder.computed,
        ),
        **GPT.dialects(),
    },
    _tensors,
    megatron=_megatron_model,
)
