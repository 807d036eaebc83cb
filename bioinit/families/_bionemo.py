"""Saved configs of encoders that BioNeMo and NeMo wrote: what families read and write alike."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families import _nemo2
from bioinit.families._encoder import WORD
from bioinit.families._fields import Codec, Only, World
from bioinit.families._nemo2 import Call, Ref
from bioinit.families._runtime import DENSE
from bioinit.families._vocabulary import vocabulary
from bioinit.families.protocol import Canonical, ReadFields, SourceField, Written
from bioinit.layout import Dims
from bioinit.mapping import Mapping as Table
from bioinit.record import SavedField
from bioinit.rules import Rule

_TASK = "it says what the run was for, which a recipe says here"
_OUTPUT = "it says what the model gave back in that run"
_KERNEL = "it chooses code that computes the same"
_HEAD = "it belongs to a head of BioNeMo's own, which is left out"
_HISTORY = "it says where the run had started"

_REASONS = {
    _HISTORY: """
        initial_ckpt_path initial_ckpt_skip_keys_with_these_prefixes nemo1_ckpt_path
        override_parent_fields""",
    _TASK: "loss_reduction_class optimizer_fn train_metric valid_metric task_type model_cls",
    _OUTPUT: """
        include_embeddings include_hiddens include_input_ids return_embeddings
        return_only_hidden_states skip_logits""",
    _KERNEL: "biobert_spec_option core_attention_override use_esm_attention",
    _HEAD: """
        cnn_dropout cnn_hidden_size cnn_num_classes encoder_frozen ft_dropout mlp_ft_dropout
        mlp_hidden_size mlp_target_size""",
}
IGNORED: Mapping[str, str] = ChainMap(
    {name: why for why, names in _REASONS.items() for name in names.split()},
    DENSE,  # type: ignore[arg-type]
)
"""Fields of BioNeMo's classes that describe no model, and those of Megatron's."""

NO_ROTARY: Mapping[str, str] = {"rotary_base": "positions are learned, so nothing is rotated"}


def fixed(why: str, *values: Any) -> Only:
    """A field with one meaning, which every version of their class has as its default."""
    return Only(values, why, written=False)


ONLY: Mapping[str, Only] = {
    "activation_func_clamp_value": fixed("activations are not clamped", None),
    "add_bias_linear": fixed("linear layers of a BERT have biases", True),
    "add_qkv_bias": fixed("linear layers of a BERT have biases anyway", False, True),
    "apply_residual_connection_post_layernorm": fixed("residuals are taken before the norm", False),
    "attention_output_gate": fixed("attention of a BERT has no gate", False),
    "experimental_attention_variant": fixed("attention of a BERT is the usual one", None),
    "gated_linear_unit": fixed("the MLP of a BERT has no gate", False),
    "heterogeneous_block_specs": fixed("all layers of a BERT are alike", False),
    "is_hybrid_model": fixed("every layer of a BERT is attention and an MLP", False),
    "layernorm_zero_centered_gamma": fixed("norms of a BERT are stored as they are", False),
    "mrope_section": fixed("positions of a BERT are one number", None),
    "mtp_num_layers": fixed("a BERT predicts the tokens that are masked", None),
    "multi_latent_attention": fixed("attention of a BERT is the usual one", False),
    "no_rope_freq": fixed("all layers of a BERT are alike", None),
    "normalization": fixed("norms of a BERT are layer norms", "LayerNorm", "layernorm"),
    "num_moe_experts": fixed("a BERT has no experts", None),
    "qk_l2_norm": fixed("queries and keys of a BERT have no norm", False),
    "qk_layernorm": fixed("queries and keys of a BERT have no norm", False),
    "rotary_interleaved": fixed("channels are rotated by halves", False),
    "rotary_percent": fixed("all channels are rotated, or none", 1.0),
    "seq_len_interpolation_factor": fixed("positions are counted as they are", None),
    "softmax_type": fixed("attention of a BERT is the usual one", "vanilla"),
    "glu_linear_offset": fixed("the MLP of a BERT has no gate", 0.0),
    "linear_attention_freq": fixed("attention of a BERT is the usual one", None),
    "window_attn_skip_freq": fixed("every token sees every other", None),
    "window_size": fixed("every token sees every other", None),
}
"""What would make it another model, in the words of Megatron's ``TransformerConfig``."""

_REASONS1 = {
    _KERNEL: "esm_gelu use_esm_attention use_pt_layernorm use_pt_mlp_out mcore_bert",
    "the tensors' names say which": "megatron_legacy",
    "max_position_embeddings says how many positions there are": "encoder_seq_length seq_length",
    _TASK: "dwnstr_task_validation drop_last",
}
IGNORED1: Mapping[str, str] = ChainMap(
    {name: why for why, names in _REASONS1.items() for name in names.split()},
    DENSE,  # type: ignore[arg-type]
)
"""Fields of NeMo 1 and BioNeMo 1 that describe no model."""

BERT1: Mapping[str, Any] = {
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "layernorm_epsilon": 1e-5,
    "init_method_std": 0.02,
    "share_embeddings_and_output_weights": True,
    "make_vocab_size_divisible_by": 128,
}
"""What NeMo 1's MegatronBertModel takes where its config is silent."""

SIZES = {
    name: name
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "layernorm_epsilon",
        "hidden_dropout",
        "attention_dropout",
        "init_method_std",
        "make_vocab_size_divisible_by",
        "share_embeddings_and_output_weights",
    )
}
"""Fields that all of these worlds call as we do."""

ONLY1: Mapping[str, Only] = {
    "activation": fixed("a BERT of NeMo 1 has gelu", "gelu"),
    "bias": fixed("linear layers of a BERT have biases", True),
    "headscale": fixed("attention of a BERT is the usual one", False),
    "normalization": fixed("norms of a BERT are layer norms", "layernorm", "LayerNorm"),
    "num_moe_experts": fixed("a BERT has no experts", None, 1),
    "openai_gelu": fixed("the gelu of a BERT is the exact one", False),
    "rotary_percentage": fixed("all channels are rotated, or none", 1.0),
    "seq_len_interpolation_factor": fixed("positions are counted as they are", None),
    "transformer_block_type": fixed(
        "this family normalizes before attention and MLP (pre-layer-norm); with norms after them "
        "(post-layer-norm) it is another model",
        "pre_ln",
    ),
}
"""What would make it another model, in the words of NeMo 1."""

GELU = (
    "torch.nn.functional.gelu",
    "torch._C._nn.gelu",
    "bionemo.esm2.model.model.esm_gelu_func",
    "megatron.core.transformer.utils.erf_gelu",
)
_ACTIVATIONS = {
    **dict.fromkeys(GELU, "gelu"),
    "megatron.core.transformer.utils.openai_gelu": "gelu_new",
    "megatron.core.activations.squared_relu": "relu2",
    "torch.nn.functional.relu": "relu",
    "torch.nn.functional.silu": "silu",
}


def _word(theirs: str) -> str:
    return _ACTIVATIONS[theirs]


def _function(ours: str) -> Ref:
    found = next((theirs for theirs, word in _ACTIVATIONS.items() if word == ours), None)
    if found is None:
        raise ValueError(f"it has {', '.join(dict.fromkeys(_ACTIVATIONS.values()))}")
    return Ref(found)


ACTIVATION: Codec = (_word, _function)
"""Activation functions: dotted names, and what transformers calls them."""


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


NUMBER: Codec = (float, _whole)
"""A number that NeMo declares as an ``int``."""


_DERIVED = ("kv_channels", "ffn_hidden_size")


def read(
    world: World,
    context: Context,
    shapes: Mapping[str, Dims],
    tokenizers: Mapping[str, int] | None = None,
    more: Mapping[str, SavedField] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ReadFields:
    """A saved config, and the size of the vocabulary from where it can be learned.

    Args:
        world: the family's table of fields.
        context: the saved config.
        shapes: the stored tensors.
        tokenizers: sizes of vocabularies by the end of a tokenizer's class.
        more: fields of ours that were learned otherwise.
        defaults: of the class of the saved config, before those of ``world``.

    Raises:
        ConfigError: heads share keys and values, or ``world`` refuses something.
    """
    groups, heads = context.data.get("num_query_groups"), context.data.get("num_attention_heads")
    if groups not in (None, heads):
        raise ConfigError(
            f"{context.where} says num_query_groups={groups!r} for num_attention_heads={heads!r}, "
            "and in these encoders every head has its own keys and values. Correct the file if "
            "that is wrong."
        )
    learned, said = _vocabulary(context, shapes, tokenizers or {})
    found = world.read(context, {**learned, **(more or {})}, defaults)
    account = tuple(
        SourceField(field.name, "ignored", "every head has its own keys and values")
        if field.name == "num_query_groups"
        else field
        for field in found.account
    )
    # None means what the family derives.
    fields = {k: v for k, v in found.fields.items() if k not in _DERIVED or v.value is not None}
    return ReadFields(fields, (*account, *said))


def _vocabulary(
    context: Context, shapes: Mapping[str, Dims], tokenizers: Mapping[str, int]
) -> tuple[dict[str, SavedField], tuple[SourceField, ...]]:
    """The size that a known tokenizer has, or a list of words; what the rows say otherwise."""
    kind = _tokenizer_of(context)
    size = next((n for name, n in tokenizers.items() if kind.endswith(name)), None)
    where = f"{context.where}: {kind}"
    words = context.carried.get("vocab.txt")
    if size is None and words is not None:
        size, where = len(words.read(0, words.size).splitlines()), str(words)
    held = [s[0] for k, s in shapes.items() if s and f".{k}".endswith(f".{WORD}")]
    if size is None or any(rows < size for rows in held):
        return vocabulary(context, shapes)
    return {"vocab_size": SavedField(size, True, where)}, ()


def _tokenizer_of(context: Context) -> str:
    """The class of the tokenizer, which stands in the model or among what it is made with."""
    model = context.tree.get("model")
    model = model if isinstance(model, Mapping) else {}
    given = model.get("model_construct_args")
    for place in (model, given if isinstance(given, Mapping) else {}):
        tokenizer = place.get("tokenizer")
        if isinstance(tokenizer, Mapping):
            return str(tokenizer.get("_target_") or "")
    return ""


def class_is(*names: str) -> Callable[[Context], bool]:
    """Whether a saved config of NeMo 2 is of one of these classes."""

    def recognizes(context: Context) -> bool:
        return (context.raw or {}).get("canonical") in names

    return recognizes


def class_of(context: Context) -> str:
    """The name of the saved config's class, without its module."""
    return str((context.raw or {}).get("canonical") or "").rpartition(".")[2]


def is_nemo_bert(kind: str) -> Callable[[Context], bool]:
    """Whether a saved config is one of NeMo's own BERTs: ``huggingface`` or ``megatron``.

    The first normalizes after attention and MLP, the second before.
    """

    def recognizes(context: Context) -> bool:
        name = str((context.raw or {}).get("canonical") or "")
        if not name.startswith("nemo.collections.llm.bert."):
            return False
        said = context.data.get("bert_type")
        named = "huggingface" if class_of(context).startswith("HuggingFace") else "megatron"
        return (said or named) == kind

    return recognizes


def size_of(name: str) -> dict[str, int]:
    """What a class of NeMo's BERTs sets by being called ``Base`` or ``Large``."""
    for word, (layers, hidden, heads) in {"Base": (12, 768, 12), "Large": (24, 1024, 16)}.items():
        if name.endswith(f"{word}Config"):
            return {
                "num_layers": layers,
                "hidden_size": hidden,
                "ffn_hidden_size": 4 * hidden,
                "num_attention_heads": heads,
            }
    return {}


def written(
    world: World,
    config: Any,
    carried: Mapping[str, Any],
    tokenizer: Collection[str],
    *,
    rules: Sequence[Rule],
    tensors: Mapping[str, Canonical],
    config_class: str,
    model_class: str = "bionemo.llm.lightning.BionemoLightningModule",
    arguments: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Written:
    """What NeMo keeps beside the weights of a model of ``config``; ``more`` are further fields."""
    fields, account = world.write(config, carried)
    keys = Table(rules).spelled_out({key: each.shape for key, each in tensors.items()})
    found = _nemo2.written(
        {**fields, **(more or {})},
        config_class=config_class,
        model_class=model_class,
        keys=tuple(keys),
        num_layers=config.num_layers,
        tokenizer=tokenizer,
        arguments=arguments or {},
        unlayered=("output_layer",),
    )
    return found._replace(account=account)


def lightning_module(tokenizer: Call | None) -> dict[str, Any]:
    """What BioNeMo's module for encoders is made with, beside its config."""
    steps = "bionemo.llm.model.biobert.lightning"
    given: dict[str, Any] = {
        "forward_step": Ref(f"{steps}.bert_forward_step"),
        "data_step": Ref(f"{steps}.biobert_data_step"),
    }
    if tokenizer is not None:
        given["model_construct_args"] = {"tokenizer": tokenizer}
    return given
