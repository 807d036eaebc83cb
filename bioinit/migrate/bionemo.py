"""Run files of BioNeMo, as far as a recipe has to know them: sections, fields, defaults.

Names and defaults: ``bionemo-llm`` ``run/config_models.py``, and what ESM-2 and Geneformer add to
it, of BioNeMo 2.0 to 2.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

MODEL = "bionemo_model_config"
DATA, PARALLEL, TRAINING = "data_config", "parallel_config", "training_config"
EXPERIMENT = "experiment_config"

SECTIONS: Mapping[str, tuple[str, str]] = {
    DATA: (
        "your data loader's",
        """train_cluster_path train_database_path valid_cluster_path valid_database_path
        micro_batch_size result_dir min_seq_length max_seq_length random_mask_strategy
        num_dataset_workers seq_length data_dir""",
    ),
    PARALLEL: (
        "how many processes there are says who starts them, torchrun for example",
        """tensor_model_parallel_size pipeline_model_parallel_size accumulate_grad_batches ddp
        remove_unused_parameters use_distributed_optimizer num_devices num_nodes""",
    ),
    TRAINING: (
        "your trainer's",
        """max_steps limit_val_batches val_check_interval precision accelerator gc_interval
        log_train_ppl log_val_ppl include_perplexity enable_checkpointing""",
    ),
    "optim_config": (
        "your optimizer's",
        """lr sgd_momentum adam_eps weight_decay use_distributed_optimizer optimizer interval
        monitor cosine_rampup_frac cosine_hold_frac warmup_steps lr_scheduler max_steps""",
    ),
    EXPERIMENT: (
        "your trainer's: what it saves while it trains, and when",
        """save_every_n_steps result_dir experiment_name restore_from_checkpoint_path
        save_last_checkpoint metric_to_monitor_for_checkpoints save_top_k
        create_tensorboard_logger create_checkpoint_callback""",
    ),
    "wandb_config": (
        "your logger's",
        "entity project tags group job_type offline id anonymous log_model name save_dir",
    ),
    "nsys_config": ("your profiler's", "start_step end_step ranks"),
}
"""Sections beside the model: whose business they are, and their fields."""

EXPOSED: Mapping[str, Any] = {
    "num_layers": 6,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 4,
    "seq_length": 512,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.02,
    "init_method_std": 0.02,
    "kv_channels": None,
    "apply_query_key_layer_scaling": False,
    "make_vocab_size_divisible_by": 128,
    "masked_softmax_fusion": True,
    "fp16_lm_cross_entropy": False,
    "gradient_accumulation_fusion": False,
    "layernorm_zero_centered_gamma": False,
    "layernorm_epsilon": 1e-12,
    "activation_func": "gelu",
    "qk_layernorm": False,
    "apply_residual_connection_post_layernorm": False,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "get_attention_mask_from_fusion": False,
    "attention_dropout": 0.1,
    "share_embeddings_and_output_weights": True,
    "enable_autocast": False,
    "biobert_spec_option": "bert_layer_with_transformer_engine_spec",
}
"""The fields of ``ExposedModelConfig`` that have a default. BioNeMo passes on all of them."""

PATH, SKIPPED, NEMO1 = (
    "initial_ckpt_path",
    "initial_ckpt_skip_keys_with_these_prefixes",
    "nemo1_ckpt_path",
)
LISTED = "override_parent_fields"
_DTYPES = ("params_dtype", "pipeline_dtype", "autocast_dtype")
_ESM2 = (
    "use_esm_attention",
    "token_dropout",
    "normalize_attention_scores",
    "core_attention_override",
)
_HEADS = """encoder_frozen task_type mlp_ft_dropout mlp_hidden_size mlp_target_size cnn_dropout
    cnn_hidden_size cnn_num_classes ft_dropout""".split()
_RUN = """tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
    sequence_parallel calculate_per_token_loss variable_seq_lengths""".split()
FIELDS = frozenset(
    (*EXPOSED, PATH, SKIPPED, NEMO1, LISTED, *_DTYPES, *_ESM2, *_HEADS, *_RUN, "vocab_size")
)
"""All fields that a ``bionemo_model_config`` of BioNeMo's own classes may have."""

PRECISIONS: Mapping[str, str] = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "bf16-mixed": "bfloat16",
    "fp32-mixed": "float32",
    "16-mixed": "float16",
    "fp16-mixed": "float16",
    "16": "float16",
    "32": "float32",
}
"""Words for a precision, and the dtype that parameters have in it."""


class Kind(NamedTuple):
    """A family that BioNeMo trains: its class, how its data and its model are known, its parts."""

    config: str
    tokenizer: str | None
    marks: Mapping[str, tuple[str, ...]]
    """By section, fields that only its runs have."""
    body: str
    """Its body in the names of the live model."""
    word: str


KINDS: Mapping[str, Kind] = {
    "esm2": Kind(
        "bionemo.esm2.model.model.ESM2Config",
        "bionemo.esm2.data.tokenizer.BioNeMoESMTokenizer",
        {
            MODEL: _ESM2,
            DATA: (
                "train_cluster_path",
                "train_database_path",
                "valid_cluster_path",
                "valid_database_path",
                "random_mask_strategy",
            ),
        },
        "esm",
        "ESM-2",
    ),
    "biobert": Kind(
        "bionemo.geneformer.api.GeneformerConfig",
        None,
        {DATA: ("data_dir", "median_dict_path", "tokenizer_vocab_path")},
        "bert",
        "Geneformer",
    ),
}
