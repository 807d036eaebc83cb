"""Models of megatron-core from a family's config, out of its modules of plain torch operations.

A family says in Megatron's words what differs from the defaults; fields that its config has under
Megatron's names are taken from there. Everything is the local spec: it needs neither Transformer
Engine nor Apex, and its ``sharded_state_dict()`` stores what that of a Transformer Engine model
stores. Where process groups divide a model, what is built is the part of this process: a stage of
the pipeline, or an ``nn.ModuleList`` of chunks for whoever trains to hand to Megatron's schedules.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bioinit.backends.megatron.divided import padded, parallel_fields, stages
from bioinit.backends.megatron.world import imported
from bioinit.errors import ConfigError
from bioinit.keys import suggestion

_SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
)
"""Fields of TransformerConfig that a config of ours gives when it has one of that name."""

_ALWAYS = {
    # Whoever gives the parameters memory is on no device yet.
    "use_cpu_initialization": True,
    "perform_initialization": True,
}
_ROWS = "rows_of_one_process"
_UNLESS_SAID = {
    # The default is a text that megatron-core itself warns about, and makes an empty list.
    "cuda_graph_scope": None,
}


def gpt(
    config: Any,
    fields: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    divisor: int = 1,
    max_sequence_length: int | None = None,
    rope_scaling: Mapping[str, float] | None = None,
    embedding_scale: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A ``GPTModel``: dense or, with ``num_moe_experts``, a mixture of experts.

    Args:
        config: of ours; gives what it has under Megatron's names.
        fields: of ``TransformerConfig``; they come before those of ``config``.
        vocab_size: rows of the embedding that one process would have, padding included;
            ``config.vocab_size`` if None.
        divisor: what the rows of every process are a multiple of.
        max_sequence_length: ``config.seq_length`` if None.
        rope_scaling: of Llama 3.1: ``factor``, and ``low_freq_factor``, ``high_freq_factor``,
            ``original_max_position_embeddings`` where they are not 1, 4 and 8192.
        embedding_scale: what embeddings are multiplied by (Gemma: the root of ``hidden_size``).
        kwargs: of ``GPTModel``: ``position_embedding_type``, ``rotary_base``, ``rotary_percent``,
            ``share_embeddings_and_output_weights``, ...; the last is taken from ``config`` too.

    Raises:
        ConfigError: megatron-core is missing, or cannot express or will not build this.
    """
    model = imported("bioinit.backends.megatron.parts").GPTModel
    transformer = transformer_config(config, fields)
    block = imported("megatron.core.transformer.transformer_block")
    norm = imported("bioinit.backends.megatron.parts").Norm
    given = _model_kwargs(config, max_sequence_length) | kwargs
    rows = config.vocab_size if vocab_size is None else vocab_size

    def stage(first: bool, last: bool, chunk: int | None) -> nn.Module:
        count = block.get_num_layers_to_build(transformer, chunk)
        layers = [_gpt_layer(transformer, norm)] * count
        built: Any = model(
            config=transformer,
            transformer_layer_spec=block.TransformerBlockSubmodules(
                layer_specs=layers, layer_norm=norm
            ),
            vocab_size=padded(rows, divisor),
            pre_process=first,
            post_process=last,
            vp_stage=chunk,
            **given,
        )
        if rope_scaling is not None:
            rotary = built.rotary_pos_emb
            rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **rope_scaling)
            built.rotary_scaling = True
        if embedding_scale is not None and first:
            built.embedding.register_forward_hook(_Scaled(embedding_scale))
        return _telling(built, rows)

    whole: nn.Module = _built(lambda: stages(stage))
    return whole


def bert(
    config: Any,
    fields: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    divisor: int = 1,
    max_sequence_length: int | None = None,
    num_tokentypes: int = 0,
    **kwargs: Any,
) -> nn.Module:
    """A ``BertModel``: layer norms before attention and MLP, a head for masked tokens.

    Args:
        config: of ours; gives what it has under Megatron's names.
        fields: of ``TransformerConfig``; they come before those of ``config``.
        vocab_size: rows of the embedding that one process would have, padding included;
            ``config.vocab_size`` if None.
        divisor: what the rows of every process are a multiple of.
        max_sequence_length: ``config.seq_length`` if None.
        num_tokentypes: 0 for a model without token types.
        kwargs: of ``BertModel``: ``add_binary_head`` (with the pooler),
            ``share_embeddings_and_output_weights``, ``position_embedding_type``, ...

    Raises:
        ConfigError: megatron-core is missing, or cannot express or will not build this.
    """
    model = imported("bioinit.backends.megatron.parts").BertModel
    layer = imported("megatron.core.models.bert.bert_layer_specs").bert_layer_local_spec
    norm = imported("bioinit.backends.megatron.parts").Norm
    transformer = transformer_config(config, fields)
    if transformer.layernorm_zero_centered_gamma or transformer.normalization != "LayerNorm":
        raise ConfigError(
            "megatron-core's BERT has layer norms with a plain weight, and "
            f"normalization={transformer.normalization!r} with layernorm_zero_centered_gamma="
            f"{transformer.layernorm_zero_centered_gamma} is asked for. Leave model.backend out."
        )
    parts = dataclasses.replace(layer.submodules, input_layernorm=norm, pre_mlp_layernorm=norm)
    given = _model_kwargs(config, max_sequence_length) | kwargs
    rows = config.vocab_size if vocab_size is None else vocab_size

    def stage(first: bool, last: bool, chunk: int | None) -> nn.Module:
        built: nn.Module = model(
            config=transformer,
            num_tokentypes=num_tokentypes,
            transformer_layer_spec=dataclasses.replace(layer, submodules=parts),
            vocab_size=padded(rows, divisor),
            pre_process=first,
            post_process=last,
            vp_stage=chunk,
            **given,
        )
        return _telling(built, rows)

    whole: nn.Module = _built(lambda: stages(stage))
    return whole


def transformer_config(config: Any, fields: Mapping[str, Any]) -> Any:
    """Megatron's ``TransformerConfig``; ``activation_func`` may be a name.

    Raises:
        ConfigError: a field that it does not have, or values that it refuses.
    """
    kind = imported("megatron.core.transformer").TransformerConfig
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"megatron-core's TransformerConfig has no field {name!r}. "
                f"{suggestion(name, known)}".strip()
            )
    given = {name: getattr(config, name) for name in _SAME if hasattr(config, name)}
    given = {**_UNLESS_SAID, **given, **fields, **_ALWAYS}
    if given.get("num_moe_experts") is not None:
        given.setdefault("moe_ffn_hidden_size", given.get("ffn_hidden_size"))
    given |= parallel_fields(given)
    if isinstance(given.get("activation_func"), str):
        given["activation_func"] = activation(given["activation_func"])
    return _built(lambda: kind(**given))


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of this name, the very function that Megatron compares with.

    Raises:
        ConfigError: megatron-core has none of this name.
    """
    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu": F.gelu,
        "silu": F.silu,
        "relu": F.relu,
        "openai_gelu": imported("megatron.core.transformer.utils").openai_gelu,
        "squared_relu": imported("megatron.core.activations").squared_relu,
    }
    if name not in known:
        raise ConfigError(
            f"megatron-core's models know no activation {name!r}; they know "
            f"{', '.join(sorted(known))}. Leave model.backend out."
        )
    return known[name]


def _gpt_layer(transformer: Any, norm: type) -> Any:
    specs = imported("megatron.core.models.gpt.gpt_layer_specs")
    layer = specs.get_gpt_layer_local_spec(
        num_experts=transformer.num_moe_experts,
        qk_layernorm=transformer.qk_layernorm,
        normalization=transformer.normalization,
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    if transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    if transformer.num_moe_experts is not None:
        # The local spec stores this norm as if it were fused into the MLP, which experts do not
        # have; a Transformer Engine model, and NeMo, store it under its own name.
        keys = dict(parts.sharded_state_dict_keys_map)
        keys.pop("pre_mlp_layernorm.", None)
        parts.sharded_state_dict_keys_map = keys
    return layer


def rows_of_one(module: nn.Module) -> int | None:
    """Rows that the embedding of ``module`` would have in one process, if it was built here."""
    return getattr(module, _ROWS, None)


def _telling(built: nn.Module, rows: int) -> nn.Module:
    setattr(built, _ROWS, rows)
    return built


def _model_kwargs(config: Any, max_sequence_length: int | None) -> dict[str, Any]:
    return {
        "max_sequence_length": (
            config.seq_length if max_sequence_length is None else max_sequence_length
        ),
        "share_embeddings_and_output_weights": getattr(
            config, "share_embeddings_and_output_weights", False
        ),
    }


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """A forward hook: what the module gives, times ``factor`` in the dtype of what it gives."""

    factor: float

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.tensor(self.factor, dtype=output.dtype)


def _built(make: Callable[[], Any]) -> Any:
    """What ``make`` gives, with the parts of Megatron that run anywhere.

    Raises:
        ConfigError: megatron-core refuses the settings.
    """
    try:
        with warnings.catch_warnings():
            # Its own specs use what it calls deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            built = make()
    except (AssertionError, TypeError, ValueError) as error:
        said = str(error).rstrip(". ") or type(error).__name__
        raise ConfigError(
            f"megatron-core cannot build this model: {said}. Change the field, or leave "
            "model.backend out to build it with transformers."
        ) from error
    if isinstance(built, nn.Module):
        imported("bioinit.backends.megatron.parts").adopt(built)
    return built
