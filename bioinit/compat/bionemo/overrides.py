"""The fields that a config keeps when it takes over settings from a checkpoint.

Whoever starts from one of the exported lists and appends to it changes that list alone: a config
makes a list of its own from tuples that nobody can write to.
"""

from __future__ import annotations

OF_EVERY_MODEL = (
    "initial_ckpt_skip_keys_with_these_prefixes",
    "override_parent_fields",
    "initial_ckpt_path_ignore_weights",
    "initial_ckpt_path",
    "model_cls",
    "bf16",
    "fp16",
    "train_metric",
    "valid_metric",
)
"""What BioNeMo 2.4 to 2.7 list. No class has a field ``initial_ckpt_path_ignore_weights``."""

OF_BIOBERT = (
    *OF_EVERY_MODEL,
    "return_only_hidden_states",
    "include_embeddings",
    "include_input_ids",
    "include_hiddens",
    "params_dtype",
    "pipeline_dtype",
    "autocast_dtype",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "sequence_parallel",
    "context_parallel_size",
    "expert_model_parallel_size",
    "apply_rope_fusion",
    "bias_dropout_fusion",
    "bias_activation_fusion",
    "attention_softmax_in_fp32",
    "get_attention_mask_from_fusion",
    "activation_func",
    "moe_extended_tp",
    "skip_logits",
)
"""The same, and what BioBERT's config lists besides."""

OVERRIDE_BIONEMO_CONFIG_DEFAULTS = list(OF_EVERY_MODEL)
"""Stands in for ``bionemo.llm.model.config.OVERRIDE_BIONEMO_CONFIG_DEFAULTS``."""

OVERRIDE_BIOBERT_CONFIG_DEFAULTS = list(OF_BIOBERT)
"""Stands in for ``bionemo.llm.model.biobert.model.OVERRIDE_BIOBERT_CONFIG_DEFAULTS``."""

_OVERRIDE_BIONEMO_CONFIG_DEFAULTS = list(OF_EVERY_MODEL)
_OVERRIDE_BIOBERT_CONFIG_DEFAULTS = list(OF_BIOBERT)
