"""GPT-NeoX: decoders whose attention and MLP may read the same input, with partly rotated heads.

GPT-NeoX counts the layers of its pipeline: the embedding is 0, transformer layer ``i`` stands at
``i + 2``, and behind them, with a place left free, the last norm and the readout. Both worlds keep
the query, key and value of a head side by side in one tensor. No world of Megatron-Core has such
layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bioinit.backends.transformers import named
from bioinit.backends.transformers.named import Line, Translation, linear
from bioinit.config import TrainableModelConfig, derived, own
from bioinit.families import _decoder, _megatron, _neox
from bioinit.families._named import hf, named_family
from bioinit.families.protocol import Canonical, Dialect
from bioinit.keys import Pattern
from bioinit.layout import Dims
from bioinit.rules import Narrow, Part, Rule, Unflatten, dropped, rename

TRANSLATION = Translation(
    "gpt_neox",
    names={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "seq_length",
        "layer_norm_eps": "layernorm_epsilon",
        "hidden_act": "activation_func",
        "hidden_dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "classifier_dropout": "classifier_dropout",
        "initializer_range": "init_method_std",
        "attention_bias": "attention_bias",
        "use_parallel_residual": "use_parallel_residual",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
        "rope_parameters.rope_theta": "rotary_base",
        "rope_parameters.partial_rotary_factor": "rotary_percent",
        "rope_parameters.rope_type": "rope_type",
    },
)


@dataclass(kw_only=True)
class GptNeoxConfig(TrainableModelConfig):
    """A GPT-NeoX model. The defaults are those of GPT-NeoX 20B, as transformers has them.

    ``make_vocab_size_divisible_by`` and ``model_parallel_size`` say to what GPT-NeoX pads the
    vocabulary: their product. ``extra`` holds fields of ``config.json`` that only transformers
    reads.
    """

    architecture: str | None = own("causal_lm")
    vocab_size: int = 50432
    num_layers: int = 44
    hidden_size: int = 6144
    ffn_hidden_size: int | None = derived(lambda c: 4 * c.hidden_size)
    num_attention_heads: int = 64
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    seq_length: int = 2048
    layernorm_epsilon: float = 1e-5
    activation_func: str = "gelu"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.1
    init_method_std: float = 0.02
    attention_bias: bool = True
    use_parallel_residual: bool = True
    share_embeddings_and_output_weights: bool = False
    rotary_base: float = 10000.0
    rotary_percent: float = 0.25
    rope_type: str = "default"
    make_vocab_size_divisible_by: int | None = derived(lambda c: _decoder.divisor(c.vocab_size))
    model_parallel_size: int = 1
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        named.checked_heads(self)
        TRANSLATION.check_extra(self.extra)

    def configure_model(self) -> nn.Module:
        """Construct the transformers model."""
        return TRANSLATION.construct(self)


_LAYER = "layers.*"
_TO = "decoder.layers.*"
_WORD = "embedding.word_embeddings.weight"
_COMPUTED = "transformers computes it from the config"
_MASK = "transformers masks what comes later by itself"

LINES: tuple[Line, ...] = (
    Line("embed_in.weight", _WORD),
    *linear(f"{_LAYER}.input_layernorm", f"{_TO}.input_layernorm"),
    *linear(f"{_LAYER}.post_attention_layernorm", f"{_TO}.pre_mlp_layernorm"),
    *linear(f"{_LAYER}.attention.dense", f"{_TO}.self_attention.linear_proj"),
    *linear(f"{_LAYER}.mlp.dense_h_to_4h", f"{_TO}.mlp.linear_fc1"),
    *linear(f"{_LAYER}.mlp.dense_4h_to_h", f"{_TO}.mlp.linear_fc2"),
    *linear("final_layer_norm", "decoder.final_layernorm"),
    # Files say embed_out, models in memory lm_head.
    Line("embed_out.weight", "output_layer.weight", is_body=False, aliases=("lm_head.weight",)),
    *linear("score", "score", is_body=False),
    *linear("classifier", "classifier", is_body=False),
    *linear("qa_outputs", "qa_outputs", is_body=False),
)
_BUFFERS = {
    f"{_LAYER}.attention.bias": _MASK,
    f"{_LAYER}.attention.masked_bias": _MASK,
    f"{_LAYER}.attention.rotary_emb.inv_freq": _COMPUTED,
    "rotary_emb.inv_freq": _COMPUTED,
}
"""What older versions of transformers stored along."""

_NAMED_LIKE_HF = hf(TRANSLATION, lambda config: LINES, ("embed_in.weight",), _megatron.heads_of)


def _hf_rules(config: Any, shapes: Mapping[str, Dims], body: str) -> list[Rule]:
    layer = f"{body}{_LAYER}"
    return [
        *_NAMED_LIKE_HF.rules(config, shapes, body),
        *_fused(f"{layer}.attention.query_key_value", config, shapes),
        *(dropped(body + key, why) for key, why in _BUFFERS.items()),
    ]


def _fused(at: str, config: Any, shapes: Mapping[str, Dims], shift: int = 0) -> Iterator[Rule]:
    """Query, key and value of one head, those of the next head, ..."""
    heads = config.num_attention_heads
    for kind in _megatron.KINDS:
        key = f"{at}.{kind}"
        rows = next((s[0] for k, s in shapes.items() if s and _is(k, key)), None)
        # Rows for heads of another size show as another canonical shape.
        is_even = rows is not None and rows % (3 * heads) == 0
        channels = (rows or 0) // (3 * heads) if is_even else config.kv_channels
        one_by_one = Unflatten(0, (heads, 3, channels))
        parts = tuple(
            Part(f"{_TO}.self_attention.linear_{name}.{kind}", (one_by_one, Narrow(1, place, 1)))
            for place, name in enumerate("qkv")
        )
        yield Rule(key, parts, shift=shift)


def _is(key: str, pattern: str) -> bool:
    """Whether ``key`` is what ``pattern`` means, whatever stands in front of it."""
    found = Pattern(pattern)
    return found.match(key) is not None or Pattern(f"**.{pattern}").match(key) is not None


_BY_NAME = (
    ("input_layernorm", "input_layernorm"),
    ("post_attention_layernorm", "pre_mlp_layernorm"),
    ("attention.dense", "self_attention.linear_proj"),
    ("mlp.dense_h_to_4h", "mlp.linear_fc1"),
    ("mlp.dense_4h_to_h", "mlp.linear_fc2"),
)
_NEWER_NAMES = (("mlp.linear1", "mlp.linear_fc1"), ("mlp.linear2", "mlp.linear_fc2"))
_NORM = re.compile(r"(?:^|\.)(\d+)\.norm\.weight")
_BARE_NORM = re.compile(r"(?:^|\.)(\d+)\.weight")
_LAYERS_ATTENTION = re.compile(r"(?:^|(?<!layers)\.)\d+\.attention\.query_key_value\.weight")


def _neox_rules(config: Any, shapes: Mapping[str, Dims], body: str) -> list[Rule]:
    is_tied = config.share_embeddings_and_output_weights
    last = _number(_NORM, shapes) or _number(_BARE_NORM, shapes) or config.num_layers + 3
    names = (*_BY_NAME, *_NEWER_NAMES)
    return [
        _vocab("0.word_embeddings.weight", _WORD, config, shapes),
        *_fused("*.attention.query_key_value", config, shapes, shift=-2),
        *(
            Rule(f"*.{theirs}.{kind}", (Part(f"{_TO}.{ours}.{kind}"),), shift=-2)
            for theirs, ours in names
            for kind in _megatron.KINDS
        ),
        *(_last_norm(f"{last}.norm.{kind}", kind) for kind in _megatron.KINDS),
        # Versions before there was a class for it.
        *(_last_norm(f"{last}.{kind}", kind) for kind in _megatron.KINDS),
        _vocab(
            f"{last + 1}.final_linear.weight",
            _WORD if is_tied else "output_layer.weight",
            config,
            shapes,
        ),
        dropped("*.attention.rotary_emb.inv_freq", _COMPUTED),
    ]


def _last_norm(key: str, kind: str) -> Rule:
    return rename(key, f"decoder.final_layernorm.{kind}")


def _number(pattern: re.Pattern[str], shapes: Mapping[str, Dims]) -> int | None:
    """The place of a layer whose names look like this, if the files have one such layer."""
    found = {int(match[1]) for key in shapes if (match := pattern.search(key)) is not None}
    return found.pop() if len(found) == 1 else None


def _vocab(key: str, to: str, config: Any, shapes: Mapping[str, Dims]) -> Rule:
    """An embedding, padded to what all partitions together need."""
    divisor = config.make_vocab_size_divisible_by * config.model_parallel_size
    stored = next((shape[0] for k, shape in shapes.items() if shape and _is(k, key)), None)
    rows = _megatron.padded(config.vocab_size, divisor)
    rows = rows if stored is None else max(stored, config.vocab_size)
    return Rule(key, (Part(to, (Narrow(0, 0, config.vocab_size, rows),)),), fill=True)


def _spells_neox(stored: Collection[str]) -> bool:
    return any(_LAYERS_ATTENTION.search(key) is not None for key in stored)


def _tensors(config: GptNeoxConfig) -> dict[str, Canonical]:
    return _decoder.tensors(
        config,
        gated=False,
        norm_bias=True,
        qkv_bias=config.attention_bias,
        proj_bias=config.attention_bias,
        mlp_bias=True,
    )


HF = dataclasses.replace(_NAMED_LIKE_HF, rules=_hf_rules)
NEOX = Dialect(
    rules=_neox_rules,
    spells=_spells_neox,
    recognizes=_neox.recognizes,
    read=_neox.read,
    write=_neox.write,
    fields=_neox.FIELDS,
    says=_neox.SAYS,
    blurs=_neox.BLURS,
    partitions="model_parallel_size",
)
_PARALLEL = (
    "the layers of GPT-NeoX add attention and MLP to the same input (use_parallel_residual), "
    "which those of {} cannot: they run one after the other"
)
_WORLDS = {
    "nemo2": "NeMo 2",
    "nemo1": "NeMo 1",
    "bridge": "Megatron-Bridge",
    "megatron": "megatron-core",
}
FAMILY = named_family(
    GptNeoxConfig,
    TRANSLATION,
    {"hf": HF, "neox": NEOX},
    _tensors,
    absent={name: _PARALLEL.format(world) for name, world in _WORLDS.items()},
)
