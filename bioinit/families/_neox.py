"""GPT-NeoX's settings: which of them say what the model is, and what the others are about.

Names and defaults: ``neox_arguments.md`` of EleutherAI/gpt-neox, v1.0 to v2.0. What is silent means
NeoX's default only in a YAML file; the few arguments that DeepSpeed keeps beside the weights are a
selection. The bias-and-gelu fusion computes gelu by its tanh approximation, which is another
activation in transformers, ``gelu_fast``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from bioinit.config import TrainableModelConfig
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError, CorruptCheckpoint
from bioinit.families._fields import Joint, Only, World
from bioinit.families.protocol import Fate, ReadFields, SourceField, Written
from bioinit.layout import Dims
from bioinit.record import SavedField
from bioinit.storage import File

_TOKENIZER = "tokenizer.json"
_LARGEST_TOKENIZER = 1 << 28
_PLAIN_ATTENTION = ("global", "flash", "all")  # "all" says how often
_OF_ANOTHER_KIND = "it is about another kind of layer, norm or position than this model has"

_DEFAULTS: Mapping[str, Any] = {
    "activation": "gelu",
    "attention_dropout": 0.0,
    "bias_gelu_fusion": False,
    "gpt_j_residual": False,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
    "layernorm_epsilon": 1e-5,
    "make_vocab_size_divisible_by": 128,
    "model_parallel_size": 1,
    "no_weight_tying": False,
    "norm": "layernorm",
    "pos_emb": "learned",
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "use_bias_in_attn_linear": True,
}
"""What NeoX takes where its YAML is silent."""

_NEWER = {"use_bias_in_attn_linear": True}
"""Fields that older versions do not have and refuse, written only where they say something."""


def _ffn_read(said: Mapping[str, Any]) -> dict[str, Any]:
    hidden = said["hidden_size"]
    if hidden is None:
        return {}
    size = said["intermediate_size"] or said["feedforward_size"]
    if size is None:
        size = int((said["expansion_factor"] or 4) * hidden)
    multiple = said["mlp_multiple_of"] or 1
    return {"hidden_size": hidden, "ffn_hidden_size": -(-size // multiple) * multiple}


def _ffn_write(ours: Mapping[str, Any]) -> dict[str, Any]:
    hidden, ffn = ours["hidden_size"], ours["ffn_hidden_size"]
    # Older versions have four times the width and no word for it.
    return {"hidden_size": hidden} | ({} if ffn == 4 * hidden else {"intermediate_size": ffn})


_READ_ACTIVATION = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "mish": "mish"}
_WRITTEN_ACTIVATION = {
    **{name: (name, False) for name in ("gelu", "relu", "mish")},
    "silu": ("swish", False),
    **{name: ("gelu", True) for name in ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")},
}


def _activation_read(said: Mapping[str, Any]) -> dict[str, Any]:
    name = said["activation"] or "gelu"
    if name not in _READ_ACTIVATION:
        raise ValueError(f"transformers' GPT-NeoX has {', '.join(_READ_ACTIVATION)}")
    if name == "gelu" and said["bias_gelu_fusion"]:
        return {"activation_func": "gelu_fast"}
    return {"activation_func": _READ_ACTIVATION[name]}


def _activation_write(ours: Mapping[str, Any]) -> dict[str, Any]:
    if ours["activation_func"] not in _WRITTEN_ACTIVATION:
        raise ValueError(f"it has {', '.join(_WRITTEN_ACTIVATION)}")
    name, is_fused = _WRITTEN_ACTIVATION[ours["activation_func"]]
    return {"activation": name, "bias_gelu_fusion": is_fused}


def _groups(*groups: tuple[str, str]) -> dict[str, str]:
    return {name: reason for names, reason in groups for name in names.split()}


_IGNORED = _groups(
    (
        """pipe_parallel_size pipe_partition_method world_size is_pipe_parallel sequence_parallel
        expert_interval distributed_backend local_rank rank deepspeed_mpi deepspeed_slurm hostfile
        include exclude num_nodes num_gpus master_port master_addr launcher global_num_gpus
        output_layer_parallelism moe_expert_parallel_size use_tutel enable_expert_tensor_parallelism
        create_moe_param_group moe_min_capacity""",
        "it says how the run was divided among devices; the reader of the partitions knows",
    ),
    (
        """optimizer optimizer_type use_bnb_optimizer zero_stage zero_optimization
        zero_reduce_scatter zero_contiguous_gradients zero_reduce_bucket_size
        zero_allgather_bucket_size lr lr_decay_style lr_decay_iters lr_decay_fraction min_lr warmup
        override_lr_scheduler use_checkpoint_lr_scheduler scheduler weight_decay clip_grad
        gradient_clipping hysteresis dynamic_loss_scale loss_scale loss_scale_window min_scale
        train_iters train_epochs train_batch_size batch_size train_micro_batch_size_per_gpu
        gradient_accumulation_steps eval_interval eval_iters seed iteration do_train do_valid
        do_test finetune exit_interval num_workers precision fp16 bf16 amp fp32_allreduce
        fp16_lm_cross_entropy deepspeed elasticity curriculum_learning curriculum_seqlen
        prescale_gradients gradient_predivide_factor sparse_gradients communication_data_type
        data_types load_universal""",
        "it says how the writer trained, not what the model is",
    ),
    (
        """data_path data_impl split mmap_warmup train_data_paths valid_data_paths test_data_paths
        train_data_weights valid_data_weights test_data_weights weight_by_num_documents
        weighted_sampler_alpha short_seq_prob eod_mask_loss pack_impl dataset_impl use_shared_fs
        save load save_interval checkpoint_factor checkpoint_scale extra_save_iters save_iters
        keep_last_n_checkpoints no_save_optim no_save_rng no_load_optim no_load_rng config_files
        checkpoint checkpoint_validation_with_forward_pass s3_path s3_chunk_size""",
        "it says where the writer's data and checkpoints were",
    ),
    (
        """log_interval log_dir tensorboard_dir steps_per_print wall_clock_breakdown use_wandb
        wandb_group wandb_team wandb_project wandb_host wandb_init_all_ranks wandb tensorboard
        git_hash log_grad_pct_zeros log_param_norm log_grad_norm log_optimizer_states
        log_gradient_noise_scale gradient_noise_scale_n_batches gradient_noise_scale_cpu_offload
        profile profile_step_start profile_step_stop profile_backward memory_profiling
        memory_profiling_path dump_state flops_profiler comms_logger autotuning use_comet
        comet_workspace comet_project comet_experiment_name char_level_ppl""",
        "it says what the writer logged",
    ),
    (
        """scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion
        bias_dropout_fusion rope_fusion layernorm_fusion rmsnorm_fusion use_cpu_initialization
        attention_softmax_in_fp32 apply_query_key_layer_scaling checkpoint_activations
        checkpoint_num_layers deepspeed_activation_checkpointing activation_checkpointing
        contiguous_checkpointing checkpoint_in_cpu synchronize_each_layer partition_activations
        onnx_safe rotary_save_freqs_buffer use_flashattn_swiglu lazy_mpu_init""",
        "it says by which kernels the same numbers were computed",
    ),
    (
        """rms_norm_epsilon scalenorm_epsilon rpe_num_buckets rpe_max_distance sparsity_config
        sparse_attention param_sharing_style gmlp_attn_dim dim_att head_size ffn_dim
        mamba_selective_scan_fusion mamba_causal_conv_fusion mamba_inner_func_fusion
        mamba_selective_fp32_params mamba_use_bias_in_conv mamba_use_bias_in_linears moe_top_k
        moe_loss_coeff moe_train_capacity_factor moe_eval_capacity_factor moe_token_dropping
        moe_use_residual moe_type moe_glu moe_lbl_in_fp32 moe_jitter_eps coord_check
        save_base_shapes base_shapes_file mup_init_scale mup_attn_temp mup_output_temp
        mup_embedding_mult mup_rp_embedding_mult mup_width_scale""",
        _OF_ANOTHER_KIND,
    ),
    (
        """text_gen_type precompute_model_name temperature top_p top_k return_logits maximum_tokens
        prompt_end sample_input_file sample_output_file num_samples recompute eval_results_prefix
        eval_tasks""",
        "it says how the writer made texts",
    ),
    ("padded_vocab_size", "the rows of the stored embedding say it"),
)

_TRANSFORMERS = "transformers' GPT-NeoX"
_WORLD = World(
    dialect="neox",
    names={
        "num_layers": "num_layers",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "seq_length",
        "layernorm_epsilon": "layernorm_epsilon",
        "hidden_dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "init_method_std": "init_method_std",
        "use_bias_in_attn_linear": "attention_bias",
        "gpt_j_residual": "use_parallel_residual",
        "no_weight_tying": "share_embeddings_and_output_weights",
        "rotary_emb_base": "rotary_base",
        "rotary_pct": "rotary_percent",
        "make_vocab_size_divisible_by": "make_vocab_size_divisible_by",
        "model_parallel_size": "model_parallel_size",
    },
    codecs={
        "share_embeddings_and_output_weights": (lambda value: not value, lambda value: not value),
        # NeoX wants an int where one will do.
        "rotary_base": (float, lambda value: int(value) if value == int(value) else value),
    },
    joint=(
        Joint(
            (
                "hidden_size",
                "intermediate_size",
                "feedforward_size",
                "expansion_factor",
                "mlp_multiple_of",
            ),
            ("hidden_size", "ffn_hidden_size"),
            _ffn_read,
            _ffn_write,
        ),
        Joint(
            ("activation", "bias_gelu_fusion"),
            ("activation_func",),
            _activation_read,
            _activation_write,
        ),
    ),
    only={
        "pos_emb": Only(("rotary",), f"{_TRANSFORMERS} has rotary positions"),
        "norm": Only(("layernorm", "te_layernorm"), f"{_TRANSFORMERS} has plain layer norms"),
        **{
            name: Only(values, why, written=False)
            for name, values, why in (
                ("model_arch", ("gpt2",), "this family is of decoders alone"),
                (
                    "gpt_j_tied",
                    (False,),
                    f"{_TRANSFORMERS} has two norms in each layer, not one for both halves",
                ),
                ("use_bias_in_norms", (True,), f"{_TRANSFORMERS} has norms with a bias"),
                ("use_bias_in_mlp", (True,), f"{_TRANSFORMERS} has an MLP with biases"),
                ("use_qk_layernorm", (False,), f"{_TRANSFORMERS} has no norm of queries and keys"),
                ("use_mup", (False,), f"{_TRANSFORMERS} has no mup scales"),
                ("mlp_type", ("regular",), f"{_TRANSFORMERS} has an MLP without a gate"),
                ("moe_num_experts", (1,), f"{_TRANSFORMERS} has no experts"),
                ("sliding_window_width", (), f"{_TRANSFORMERS} has no window"),
                ("opt_pos_emb_offset", (0,), f"{_TRANSFORMERS} has rotary positions"),
                ("extra_sentinel_tokens", (0,), "these tokens are of T5"),
            )
        },
    },
    lacks={"rope_type": ("default",)},
    ignored=_IGNORED,
)


FIELDS: Mapping[str, str] = {
    **_WORLD.names,
    **{theirs: ", ".join(joint.ours) for joint in _WORLD.joint for theirs in joint.theirs},
}
"""Which field of ours each field is, or helps to say."""

SAYS = _WORLD.says
BLURS = {"activation_func": _WRITTEN_ACTIVATION.get}
"""NeoX has one word for three of transformers', which approximate gelu in the same way."""


def read(context: Context, shapes: Mapping[str, Dims] | None = None) -> ReadFields:
    """The fields of NeoX's settings; the vocabulary is the tokenizer's, or what is stored.

    Raises:
        ConfigError: it is a model that transformers' GPT-NeoX is not.
    """
    _require_alike(context)
    more: dict[str, SavedField] = {}
    vocab = _vocabulary(context, shapes or {})
    if vocab is not None:
        more["vocab_size"] = vocab
    is_whole = isinstance(context.raw, Mapping) and "said" in context.raw
    found = _WORLD.read(context, more, _DEFAULTS if is_whole else {})
    alike = dict.fromkeys(("attention_config", "num_unique_layers", "num_kv_heads"), _ALIKE)
    fates: dict[str, tuple[Fate, str]] = {**alike, "soft_prompt_tuning": ("ignored", "it is off")}
    if context.data.get("bias_gelu_fusion"):
        fates["bias_gelu_fusion"] = ("mapped", f"activation_func: {_TANH}")
    if context.data.get("seq_length") == context.data.get("max_position_embeddings"):
        # A shorter one is that of the training samples.
        fates["seq_length"] = ("mapped", "seq_length")
    account = (SourceField(f.name, *fates.get(f.name, (f.fate, f.note))) for f in found.account)
    return ReadFields(found.fields, tuple(account))


def write(
    config: TrainableModelConfig, carried: Mapping[str, Any], tokenizer: Collection[str]
) -> Written:
    """``configs/neox.yml``; the writer of the format makes the folder of a step beside it."""
    found, account = _WORLD.write(config, carried)
    for name, usual in _NEWER.items():
        if found.get(name) == usual and name not in carried:
            del found[name]
    length = found["max_position_embeddings"]
    found["seq_length"] = min(int(carried.get("seq_length") or length), length)
    # Files of single layers are what a pipeline reads.
    found.setdefault("pipe_parallel_size", 1)
    if _TOKENIZER in tokenizer:
        found |= {"tokenizer_type": "HFTokenizer", "vocab_file": _TOKENIZER}
    text = yaml.safe_dump(found, sort_keys=True, allow_unicode=True)
    unsaid = (SourceField(name, "ignored", why) for name, why in _UNSAID.items())
    return Written({"configs/neox.yml": text.encode()}, account=(*account, *unsaid))


_TANH = (
    "gelu by its tanh approximation, which transformers calls gelu_fast, gelu_new and "
    "gelu_pytorch_tanh; gelu_fast is taken where nothing beside says which"
)
_ALIKE: tuple[Fate, str] = ("ignored", "all layers and heads are alike")
_UNSAID = {
    "vocab_size": "NeoX asks the tokenizer, and the rows of the embedding say it, padding included",
    "kv_channels": "it is hidden_size over num_attention_heads",
    "classifier_dropout": "it belongs to a head that NeoX does not have",
}


def recognizes(context: Context) -> bool:
    """Whether these are settings of GPT-NeoX; Savanna, which writes such files too, has others."""
    return context.dialect == "neox" and "operator_config" not in context.data


def _require_alike(context: Context) -> None:
    """Refuse layers that share weights, heads that share keys, and attention of other kinds."""
    data = context.data
    strange = sorted(_words(data.get("attention_config")).difference(_PLAIN_ATTENTION))
    layers, unique = data.get("num_layers"), data.get("num_unique_layers")
    heads, kv_heads = data.get("num_attention_heads"), data.get("num_kv_heads")
    prompt = data.get("soft_prompt_tuning")
    wrong = {
        "attention_config": strange and f"attention of the kind {', '.join(strange)}",
        "num_unique_layers": unique not in (None, layers) and "layers that share their weights",
        "num_kv_heads": kv_heads not in (None, heads) and "heads that share keys and values",
        "soft_prompt_tuning": isinstance(prompt, Mapping)
        and prompt.get("enabled", True)
        and "a learned prompt",
    }
    for name, what in wrong.items():
        if what:
            raise ConfigError(
                f"{context.where} says {name}={data[name]!r:.200}: {what}, which {_TRANSFORMERS} "
                "does not have. If the file is wrong, correct it."
            )


def _words(value: Any) -> set[str]:
    """The texts in nested lists."""
    if isinstance(value, str):
        return {value}
    return set().union(*map(_words, value)) if isinstance(value, list | tuple) else set()


def _vocabulary(context: Context, shapes: Mapping[str, Dims]) -> SavedField | None:
    file = context.carried.get(_TOKENIZER)
    if file is not None:
        return SavedField(_tokens(file), True, f"{file}: the tokens that it has")
    word = "word_embeddings.weight"
    rows = (shape[0] for key, shape in shapes.items() if shape and key.endswith(word))
    size = next(rows, None)
    if size is None:
        return None
    return SavedField(size, False, f"the rows of the stored {word}, padding included")


def _tokens(file: File) -> int:
    """How many tokens a ``tokenizer.json`` has, added ones included.

    Raises:
        CorruptCheckpoint: it is none.
    """
    try:
        if file.size > _LARGEST_TOKENIZER:
            raise ValueError(f"it has {file.size} bytes")
        document = json.loads(file.read(0, file.size))
        ids = [int(token["id"]) for token in document.get("added_tokens") or ()]
        vocab = document["model"]["vocab"]
        ids += vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return 1 + max(ids)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{file} is no tokenizer.json whose tokens can be counted "
            f"({type(error).__name__}: {error}). Fetch it again, or take it away: the stored "
            "embedding says then how large the vocabulary is."
        ) from error
