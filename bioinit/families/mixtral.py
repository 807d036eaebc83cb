"""Mixtral: decoders with several MLPs in each layer, of which a router picks some for each token.

An expert's tensors have a spelling of their own wherever they lie. transformers stores each expert
alone and holds all of a layer in one tensor; Megatron-Core stores all experts of all layers in one
tensor and holds them in one of three ways, of which the oldest declares another shape than it uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends.transformers.named import Line, Translation
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.errors import ConfigError
from bioinit.families import _decoder, _megatron
from bioinit.families._fields import Joint, Only
from bioinit.families._gpt import Gpt
from bioinit.families._kinds import Kind
from bioinit.families._live import gpt
from bioinit.families._named import hf, named_family
from bioinit.families._runtime import RUNTIME
from bioinit.families._worlds import WINDOW
from bioinit.families.protocol import Canonical
from bioinit.layout import Dims
from bioinit.rules import Each, Narrow, Part, Permute, Reinterpret, Rule, rename

TRANSLATION = Translation(
    "mixtral",
    names={
        **_decoder.FIELDS,
        "sliding_window": "window_size",
        "num_local_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "router_aux_loss_coef": "moe_aux_loss_coeff",
        "router_jitter_noise": "moe_input_jitter_eps",
    },
)


@dataclass(kw_only=True)
class MixtralConfig(TrainableModelConfig):
    """A Mixtral model. The defaults are those of 8x7B; sizes are presets in ``conf/model``.

    ``extra`` holds fields of ``config.json`` that only transformers reads.
    """

    architecture: str | None = own("causal_lm")
    vocab_size: int = 32000
    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 14336
    num_attention_heads: int = 32
    num_query_groups: int | None = derived(lambda c: c.num_attention_heads)
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    activation_func: str = "silu"
    num_moe_experts: int = 8
    moe_router_topk: int = 2
    moe_aux_loss_coeff: float = 0.001
    moe_input_jitter_eps: float = 0.0
    seq_length: int = 32768
    window_size: int | None = None
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    share_embeddings_and_output_weights: bool = False
    rotary_base: float = 1000000.0
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
        if not 1 <= self.moe_router_topk <= self.num_moe_experts:
            raise ConfigError(
                f"moe_router_topk={self.moe_router_topk}, of num_moe_experts="
                f"{self.num_moe_experts}. A token goes to at least one expert, and to each at most "
                "once. Correct one of them."
            )
        TRANSLATION.check_extra(self.extra)

    def configure_model(self) -> nn.Module:
        """Construct the transformers model."""
        return TRANSLATION.construct(self)


_LAYER = "layers.*"
_MLP = "decoder.layers.*.mlp"
_EXPERT = f"{_MLP}.experts.*"
_WEIGHT = "weight"

LINES: tuple[Line, ...] = (
    *_decoder.outside(),
    *_decoder.around(),
    Line(
        f"{_LAYER}.block_sparse_moe.gate.weight",
        f"{_MLP}.router.weight",
        aliases=(f"{_LAYER}.mlp.gate.weight",),
    ),
    *(
        Line(f"{_LAYER}.block_sparse_moe.experts.*.{theirs}.weight", f"{_EXPERT}.{ours}.weight")
        for theirs, ours in (
            ("w1", "linear_fc1_gate"),
            ("w3", "linear_fc1_up"),
            ("w2", "linear_fc2"),
        )
    ),
)
"""What is stored; the router's name in memory is an alias."""


def _hf_rules(config: Any, shapes: Mapping[str, Dims], body: str) -> list[Rule]:
    # In memory, all experts of a layer are one tensor.
    experts = f"{body}{_LAYER}.mlp.experts"
    return [
        *_NAMED_LIKE_HF.rules(config, shapes, body),
        *_of_all(f"{experts}.gate_up_proj", f"{experts}.down_proj", config),
    ]


def _of_all(first: str, second: str, config: Any, *before: Any) -> Iterator[Rule]:
    """Both linear layers of all experts of a layer; the expert is the first dim."""
    yield _megatron.gate_and_up(first, _EXPERT, _WEIGHT, config.ffn_hidden_size, Each(0, 1))
    yield Rule(second, (Part(f"{_EXPERT}.linear_fc2.weight", (Each(0, 1),)),))


def _of_one(at: str, to: str, config: Any, number: str = "") -> Iterator[Rule]:
    """Both linear layers of one expert."""
    kind = _WEIGHT
    ffn = config.ffn_hidden_size
    yield _megatron.gate_and_up(f"{at}.linear_fc1.{kind}{number}", to, kind, ffn)
    yield rename(f"{at}.linear_fc2.{kind}{number}", f"{to}.linear_fc2.{kind}")


def _mlp_rules(config: Any) -> list[Rule]:
    """One layer's MLP in Megatron-Core, and the norm before it, which nothing is fused with."""
    at = f"{_MLP}.experts"
    one_by_one = range(config.num_moe_experts)
    return [
        *_megatron.norm(
            "decoder.layers.*.pre_mlp_layernorm.", "decoder.layers.*.pre_mlp_layernorm"
        ),
        rename(f"{_MLP}.router.weight", f"{_MLP}.router.weight"),
        # Stored: all experts on one dim, whatever they are in memory.
        *_of_all(f"{at}.experts.linear_fc1.weight", f"{at}.experts.linear_fc2.weight", config),
        # Stored where layers or experts are kept apart; the gate has a key of its own then.
        *_of_one(f"{at}.experts.*", _EXPERT, config),
        rename(f"{at}.experts.*.linear_fc1.weight_w", f"{_EXPERT}.linear_fc1_gate.weight"),
        rename(f"{at}.experts.*.linear_fc1.weight_v", f"{_EXPERT}.linear_fc1_up.weight"),
        # In memory: SequentialMLP, TEGroupedMLP, GroupedMLP.
        *_of_one(f"{at}.local_experts.*", _EXPERT, config),
        *(r for n in one_by_one for r in _of_one(at, f"{at}.{n}", config, str(n))),
        *_grouped(at, config),
    ]


def _grouped(at: str, config: Any) -> Iterator[Rule]:
    """Megatron's GroupedMLP: weights the other way round, which it views as if experts came first.

    ``weight1`` is declared as (hidden, experts * 2 ffn) and holds (experts, hidden, 2 ffn).
    """
    experts, hidden, ffn = config.num_moe_experts, config.hidden_size, config.ffn_hidden_size
    as_used = Reinterpret((hidden, experts * 2 * ffn), (experts, hidden, 2 * ffn))
    to = f"{_EXPERT}.linear_fc"
    turned = (as_used, Each(0, 1), Permute((1, 0)))
    yield Rule(
        f"{at}.weight1",
        (
            Part(f"{to}1_gate.weight", (*turned, Narrow(0, 0, ffn))),
            Part(f"{to}1_up.weight", (*turned, Narrow(0, ffn, ffn))),
        ),
    )
    by_expert = Reinterpret((experts * ffn, hidden), (experts, ffn, hidden))
    yield Rule(f"{at}.weight2", (Part(f"{to}2.weight", (by_expert, Each(0, 1), Permute((1, 0)))),))


def _tensors(config: MixtralConfig) -> dict[str, Canonical]:
    found = {k: v for k, v in _decoder.tensors(config).items() if ".mlp." not in k}
    for layer in range(config.num_layers):
        at = f"decoder.layers.{layer}.mlp"
        found[f"{at}.router.weight"] = Canonical((config.num_moe_experts, config.hidden_size))
        for expert in range(config.num_moe_experts):
            shapes = _decoder.mlp(f"{at}.experts.{expert}", config, gated=True, bias=False)
            found |= {key: Canonical(shape) for key, shape in shapes}
    return found


def _is_mixtral(kind: Kind) -> bool:
    usual = Kind("RMSNorm", gated=True, activation="silu", rotary=True, experts=True)
    return kind._replace(window=False) == usual


def _ffn_read(said: Mapping[str, Any]) -> dict[str, Any]:
    # Where every layer has experts, the width of a plain MLP means nothing.
    return {"ffn_hidden_size": said["moe_ffn_hidden_size"] or said["ffn_hidden_size"]}


def _ffn_write(ours: Mapping[str, Any]) -> dict[str, Any]:
    return dict(ours)


def _length_read(said: Mapping[str, Any]) -> dict[str, Any]:
    return {"seq_length": said["seq_length"] or said["max_position_embeddings"]}


def _length_write(ours: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(("seq_length", "max_position_embeddings"), ours["seq_length"])


_FFN = Joint(
    ("ffn_hidden_size", "moe_ffn_hidden_size"), ("ffn_hidden_size",), _ffn_read, _ffn_write
)
_LENGTH = Joint(
    ("seq_length", "max_position_embeddings"), ("seq_length",), _length_read, _length_write
)
_ROUTED = "the weights of the experts that a token goes to sum to one"
_ALIKE = "every layer of this family has experts, and no other MLP"
_ROUTERS = "this family has a plain router"
_SAME = ("moe_router_topk", "moe_aux_loss_coeff", "moe_input_jitter_eps")
_NAMES = {name: name for name in (*_SAME, "num_moe_experts")} | {"window_size": "window_size"}
_ONLY: dict[str, Only] = {
    # NeMo's class has had True; with it, the weights do not sum to one.
    "moe_router_pre_softmax": Only((False,), _ROUTED),
    **{
        name: Only(values, why, written=False)
        for name, values, why in (
            ("moe_layer_freq", (1,), _ALIKE),
            ("moe_shared_expert_intermediate_size", (None, 0), _ALIKE),
            ("moe_shared_expert_gate", (False,), _ALIKE),
            ("moe_latent_size", (None,), _ALIKE),
            ("moe_router_score_function", ("softmax",), _ROUTERS),
            ("moe_router_enable_expert_bias", (False,), _ROUTERS),
            ("moe_router_topk_limited_devices", (None,), _ROUTERS),
            ("moe_router_topk_scaling_factor", (None,), _ROUTERS),
            ("moe_router_num_groups", (None,), _ROUTERS),
            ("moe_router_group_topk", (None,), _ROUTERS),
        )
    },
}

_AT = "nemo.collections.llm.gpt.model.mixtral"
_PLAIN: dict[str, Any] = {
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
    "seq_length": 4096,
    "attention_dropout": 0.0,
    "share_embeddings_and_output_weights": False,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "rotary_base": 1000000,
}
_SMALL = {"hidden_size": 2560, "ffn_hidden_size": 8960}
_LARGE = {
    "num_layers": 56,
    "hidden_size": 6144,
    "num_attention_heads": 48,
    "ffn_hidden_size": 16384,
}

GPT = Gpt(
    tensors=_tensors,
    gated=True,
    normalization="RMSNorm",
    fits=_is_mixtral,
    at=_AT,
    classes={
        "MixtralConfig": _PLAIN,
        "MixtralConfig8x3B": _PLAIN | _SMALL,
        "MixtralConfig8x7B": _PLAIN,
        "MixtralConfig8x22B": _PLAIN | _LARGE,
    },
    model=f"{_AT}.MixtralModel",
    at_bridge="megatron.bridge.models.mixtral.mixtral_provider",
    bridge={"MixtralModelProvider": _PLAIN | {"seq_length": 32768, "vocab_size": 32000}},
    config_class=lambda config: f"{_AT}.MixtralConfig",
    names={
        "nemo2": _NAMES,
        "nemo1": _NAMES,
        "megatron": {
            **{name: name for name in _SAME},
            "num_experts": "num_moe_experts",
            "window_size": "window_size",
        },
    },
    joint={"nemo2": (_FFN, _LENGTH), "nemo1": (_FFN,), "megatron": (_FFN,)},
    only={"nemo2": _ONLY, "nemo1": _ONLY, "megatron": _ONLY},
    codecs={
        "window_size": WINDOW,
        "moe_input_jitter_eps": (lambda value: value or 0.0, lambda value: value or None),
    },
    mlp=_mlp_rules,
    ignored=RUNTIME,
)


def _megatron_model(config: MixtralConfig) -> nn.Module:
    fields = {name: getattr(config, name) for name in ("num_moe_experts", *_SAME)}
    fields["moe_input_jitter_eps"] = config.moe_input_jitter_eps or None
    if config.window_size is not None:
        # It counts what is before a token here, and the token as well in transformers.
        fields["window_size"] = (config.window_size - 1, 0)
    return gpt(config, TRANSLATION, fields)


_NAMED_LIKE_HF = hf(
    TRANSLATION,
    lambda config: LINES,
    ("block_sparse_moe.gate.weight",),
    _megatron.heads_of,
    more=_decoder.computed,
)

FAMILY = named_family(
    MixtralConfig,
    TRANSLATION,
    {"hf": dataclasses.replace(_NAMED_LIKE_HF, rules=_hf_rules), **GPT.dialects()},
    _tensors,
    megatron=_megatron_model,
)
