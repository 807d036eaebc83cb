"""Llama 2, 3, 3.1 and 3.2: decoders with rotary positions, RMS norms and gated MLPs."""

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
    "llama",
    names={
        **_decoder.FIELDS,
        "attention_bias": "add_attention_bias",
        "mlp_bias": "add_mlp_bias",
    },
)


@dataclass(kw_only=True)
class LlamaConfig(TrainableModelConfig):
    """A Llama model. The defaults are those of Llama 2 7B; sizes are presets in ``conf/model``.

    ``extra`` holds fields of ``config.json`` that only transformers reads.
    """

    architecture: str | None = own("causal_lm")
    vocab_size: int = 32000
    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 11008
    num_attention_heads: int = 32
    num_query_groups: int | None = derived(lambda c: c.num_attention_heads)
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    activation_func: str = "silu"
    seq_length: int = 4096
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    add_attention_bias: bool = False
    add_mlp_bias: bool = False
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


def _tensors(config: LlamaConfig) -> dict[str, Canonical]:
    return _decoder.tensors(
        config,
        qkv_bias=config.add_attention_bias,
        proj_bias=config.add_attention_bias,
        mlp_bias=config.add_mlp_bias,
    )


def _is_llama(kind: Kind) -> bool:
    return kind == Kind("RMSNorm", gated=True, activation="silu", rotary=True)


def _config_class(config: LlamaConfig) -> str:
    return f"{_AT}.{'Llama31Config' if config.rope_type == 'llama3' else 'LlamaConfig'}"


def _megatron_model(config: LlamaConfig) -> nn.Module:
    if config.add_attention_bias != config.add_mlp_bias:
        raise ConfigError(
            f"add_attention_bias={config.add_attention_bias} and add_mlp_bias="
            f"{config.add_mlp_bias}, and megatron-core has one switch for both. Leave "
            "model.backend out: transformers builds it."
        )
    return gpt(config, TRANSLATION, {"add_bias_linear": config.add_mlp_bias})


def _sized(layers: int, hidden: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return {**_PLAIN, **sizes, "num_query_groups": 8, "ffn_hidden_size": ffn, **more}


_AT = "nemo.collections.llm.gpt.model.llama"
_PLAIN: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": "torch.nn.functional.silu",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "seq_length": 4096,
    "attention_dropout": 0.0,
    "share_embeddings_and_output_weights": False,
}
_LLAMA3 = {"init_method_std": 0.01}
_LONG = {"rotary_base": 500000, "seq_length": 8192}
_SCALED = {
    "init_method_std": 0.02,
    "scale_factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "old_context_len": 8192,
}
_LLAMA31 = _SCALED | {"rotary_base": 500000, "seq_length": 131072}
# NeMo 2 says no seq_length of its 3.2 models, so the class's general one is in force.
_LLAMA32 = _LLAMA31 | {
    "scale_factor": 32,
    "seq_length": 4096,
    "share_embeddings_and_output_weights": True,
}
_CODE = {"rotary_base": 1000000, "seq_length": 16384}
_LLAMA_2_7B = _sized(32, 4096, 32, 11008, num_query_groups=32)
_LLAMA_2_13B = _sized(40, 5120, 40, 13824, num_query_groups=40)
_LLAMA_2_70B = _sized(80, 8192, 64, 28672)

CLASSES: dict[str, dict[str, Any]] = {
    "LlamaConfig": _PLAIN,
    "Llama2Config7B": _LLAMA_2_7B,
    "Llama2Config13B": _LLAMA_2_13B,
    "Llama2Config70B": _LLAMA_2_70B,
    "Llama3Config": {**_PLAIN, "num_query_groups": 8, **_LLAMA3},
    "Llama3Config8B": _sized(32, 4096, 32, 14336, **_LLAMA3, **_LONG),
    "Llama3Config70B": _sized(80, 8192, 64, 28672, init_method_std=0.008944, **_LONG),
    "Llama31Config": {**_PLAIN, "num_query_groups": 8, **_SCALED},
    "Llama31Config8B": _sized(32, 4096, 32, 14336, **_LLAMA31),
    "Llama31Config70B": _sized(80, 8192, 64, 28672, **_LLAMA31),
    "Llama31Config405B": _sized(126, 16384, 128, 53248, **_LLAMA31),
    "Llama32Config1B": _sized(16, 2048, 32, 8192, **_LLAMA32),
    "Llama32Config3B": _sized(28, 3072, 24, 8192, **_LLAMA32),
    "Llama31NemotronNano8BConfig": _sized(32, 4096, 32, 14336, **_LLAMA31, kv_channels=128),
    "Llama31Nemotron70BConfig": _sized(80, 8192, 64, 28672, **_LLAMA31, kv_channels=128),
    "CodeLlamaConfig7B": {**_LLAMA_2_7B, **_CODE},
    "CodeLlamaConfig13B": {**_LLAMA_2_13B, **_CODE},
    "CodeLlamaConfig34B": _sized(48, 8192, 64, 22016, **_CODE),
    "CodeLlamaConfig70B": _LLAMA_2_70B,
}
"""NeMo 2's classes, and what each sets."""


def _in_bridge(name: str, sets: dict[str, Any]) -> dict[str, Any]:
    """What Bridge's class sets: positions are scaled by a switch, and 3.2 is as long as 3.1."""
    if "scale_factor" not in sets:
        return sets
    kept = {key: value for key, value in sets.items() if key not in _SCALED}
    length = {"seq_length": 131072} if "Llama32" in name else {}
    scaled = {"rope_scaling": True, "rope_scaling_factor": sets["scale_factor"]}
    return {**kept, "init_method_std": sets["init_method_std"], **length, **scaled}


BRIDGE = {
    name.replace("Config", "ModelProvider"): _in_bridge(name, sets)
    for name, sets in CLASSES.items()
}
"""Megatron-Bridge's, which are called by another word."""

GPT = Gpt(
    tensors=_tensors,
    gated=True,
    normalization="RMSNorm",
    fits=_is_llama,
    at=_AT,
    classes=CLASSES,
    model=f"{_AT}.LlamaModel",
    at_bridge="megatron.bridge.models.llama.llama_provider",
    bridge=BRIDGE,
    config_class=_config_class,
    has_biases="all",
    scales=True,
)

FAMILY = named_family(
    LlamaConfig,
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
