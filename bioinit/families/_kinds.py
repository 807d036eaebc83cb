"""What kind of decoder a saved config describes, where no class of its own says so.

NeMo 1 and Megatron-LM have one class for all of them, and so have plain ``GPTConfig`` and
``GPTModelProvider``: there the norm, the activation and the attention tell a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bioinit.contexts.protocol import Context

GENERAL = (
    "nemo.collections.llm.gpt.model.base.GPTConfig",
    "megatron.bridge.models.gpt_provider.GPTModelProvider",
)
"""Classes that presets of many families are instances of."""

ACTIVATIONS: Mapping[str, str] = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "relu": "torch.nn.functional.relu",
    "gelu_pytorch_tanh": "nemo.collections.llm.fn.activation.openai_gelu",
    "relu2": "nemo.collections.llm.fn.activation.squared_relu",
    "quick_gelu": "nemo.collections.llm.fn.activation.quick_gelu",
}
"""Our words, which are those of transformers, and NeMo 2's functions."""

_WORDS = {function.rpartition(".")[2]: word for word, function in ACTIVATIONS.items()} | {
    "fast_gelu": "gelu_pytorch_tanh",
}
_OF_NEMO_1 = {
    "gelu": (False, "gelu"),
    "geglu": (True, "gelu"),
    "fast-geglu": (True, "gelu"),
    "swiglu": (True, "silu"),
    "fast-swiglu": (True, "silu"),
    "reglu": (True, "relu"),
    "fast-reglu": (True, "relu"),
    "squared-relu": (False, "relu2"),
}


class Kind(NamedTuple):
    """What tells families of decoders apart."""

    norm: str
    gated: bool
    activation: str
    rotary: bool
    experts: bool = False
    window: bool = False
    capped: bool = False
    """Whether attention scores or logits are kept within bounds."""


def activation_of(function: str) -> str:
    """Our word for the function that a saved config names with dots; ``KeyError`` if unknown."""
    return _WORDS[str(function).rpartition(".")[2]]


def of_nemo1(data: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether MLPs have a gate, and their activation, in NeMo 1's fields."""
    gated, activation = _OF_NEMO_1[str(data.get("activation") or "gelu")]
    if activation == "gelu" and data.get("openai_gelu"):
        activation = "gelu_pytorch_tanh"
    return gated, activation


def of_arguments(data: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether MLPs have a gate, and their activation, in Megatron-LM's arguments."""
    if data.get("swiglu"):
        return True, "silu"
    if data.get("quick_geglu"):
        return True, "quick_gelu"
    if data.get("squared_relu"):
        return False, "relu2"
    return False, "gelu_pytorch_tanh" if data.get("openai_gelu") else "gelu"


def kind_of(context: Context) -> Kind | None:
    """What kind of decoder ``context`` describes; None if it is none, or cannot be told."""
    try:
        return _KINDS[context.dialect](context.data)
    except (KeyError, ValueError, TypeError):
        return None


def _nemo2(data: Mapping[str, Any]) -> Kind:
    return Kind(
        str(data["normalization"]),
        bool(data["gated_linear_unit"]),
        activation_of(data["activation_func"]),
        data.get("position_embedding_type") == "rope",
        bool(data.get("num_moe_experts")),
        data.get("window_size") is not None,
        bool(data.get("attn_logit_softcapping") or data.get("final_logit_softcapping")),
    )


def _nemo1(data: Mapping[str, Any]) -> Kind:
    norm = str(data.get("normalization", "layernorm")).lower()
    special = data.get("mcore_customization_config") or {}
    return Kind(
        {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}[norm],
        *of_nemo1(data),
        data.get("position_embedding_type") == "rope",
        bool(data.get("num_moe_experts")),
        data.get("window_size") is not None,
        bool(special.get("attn_logit_softcapping") or special.get("final_logit_softcapping")),
    )


def _megatron(data: Mapping[str, Any]) -> Kind:
    rotary = data.get("position_embedding_type") == "rope"
    return Kind(
        str(data.get("normalization", "LayerNorm")),
        *of_arguments(data),
        rotary or bool(data.get("use_rotary_position_embeddings")),
        bool(data.get("num_experts")),
        data.get("window_size") is not None,
    )


_KINDS = {"nemo2": _nemo2, "bridge": _nemo2, "nemo1": _nemo1, "megatron": _megatron}
