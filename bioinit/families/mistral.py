"""Mistral: Llama's layers, with a window in which attention looks back, or without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends.transformers.named import Translation
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.families import _decoder, _megatron
from bioinit.families._gpt import Gpt
from bioinit.families._kinds import Kind
from bioinit.families._live import gpt
from bioinit.families._named import hf, named_family
from bioinit.families._worlds import WINDOW
from bioinit.families.protocol import Canonical

TRANSLATION = Translation("mistral", names={**_decoder.FIELDS, "sliding_window": "window_size"})


@dataclass(kw_only=True)
class MistralConfig(TrainableModelConfig):
    """A Mistral model. The defaults are those of Mistral 7B v0.1; sizes are in ``conf/model``.

    ``window_size`` is how many tokens attention looks back, None for all. ``extra`` holds fields of
    ``config.json`` that only transformers reads.
    """

    architecture: str | None = own("causal_lm")
    vocab_size: int = 32000
    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 14336
    num_attention_heads: int = 32
    num_query_groups: int | None = 8
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    activation_func: str = "silu"
    seq_length: int = 32768
    window_size: int | None = 4096
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    share_embeddings_and_output_weights: bool = False
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


def _tensors(config: MistralConfig) -> dict[str, Canonical]:
    return _decoder.tensors(config)


def _is_mistral(kind: Kind) -> bool:
    # Without a window it is a Llama as well, which is found first.
    return kind._replace(window=False) == Kind(
        "RMSNorm", gated=True, activation="silu", rotary=True
    )


def _megatron_model(config: MistralConfig) -> nn.Module:
    window = config.window_size
    # Megatron counts the tokens before the one that looks; transformers counts that one too. What
    # NeMo writes into a config is transformers' number, so its own runs see one token more.
    return gpt(config, TRANSLATION, {"window_size": None if window is None else (window - 1, 0)})


_AT = "nemo.collections.llm.gpt.model.mistral"
_BRIDGE = "megatron.bridge.models.mistral.mistral_provider"
_7B: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": "torch.nn.functional.silu",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "ffn_hidden_size": 14336,
    "seq_length": 32768,
    "attention_dropout": 0.0,
    "share_embeddings_and_output_weights": False,
    "window_size": (4096, 0),
}
_NEMO = {"kv_channels": 128, "seq_length": 4096, "window_size": None, "rotary_base": 1000000.0}
_12B = {"num_layers": 40, "hidden_size": 5120}
_123B = {"num_layers": 88, "hidden_size": 12288, "num_attention_heads": 96}

CLASSES: dict[str, dict[str, Any]] = {
    "MistralConfig7B": _7B,
    "MistralNeMo2407Config12B": {**_7B, **_NEMO, **_12B},
    "MistralNeMoConfig12B": {**_7B, **_NEMO, **_12B},
    "MistralNeMo2407Config123B": {**_7B, **_NEMO, **_123B, "ffn_hidden_size": 28672},
    "MistralNeMoConfig123B": {**_7B, **_NEMO, **_123B, "ffn_hidden_size": 28672},
}
"""NeMo 2's classes, and what each sets."""

BRIDGE: dict[str, dict[str, Any]] = {
    "MistralModelProvider": {
        **_7B,
        "window_size": None,
        "rotary_base": 1000000.0,
        "vocab_size": 32768,
    },
    "MistralSmall3ModelProvider24B": {
        **_7B,
        "num_layers": 40,
        "hidden_size": 5120,
        "ffn_hidden_size": 32768,
        "kv_channels": 128,
        "window_size": None,
        "rotary_base": 100000000.0,
        "vocab_size": 131072,
    },
}

GPT = Gpt(
    tensors=_tensors,
    gated=True,
    normalization="RMSNorm",
    fits=_is_mistral,
    at=_AT,
    classes=CLASSES,
    model=f"{_AT}.MistralModel",
    at_bridge=_BRIDGE,
    bridge=BRIDGE,
    config_class=lambda config: f"{_AT}.MistralConfig7B",
    names={world: {"window_size": "window_size"} for world in ("nemo2", "nemo1", "megatron")},
    codecs={"window_size": WINDOW},
)

FAMILY = named_family(
    MistralConfig,
    TRANSLATION,
    {
        "hf": hf(
            TRANSLATION,
            lambda config: _decoder.lines(),
            ("self_attn.q_proj.weight",),
            _megatron.heads_of,
            more=_decoder.computed,
        ),
        **GPT.dialects(),
    },
    _tensors,
    megatron=_megatron_model,
)
