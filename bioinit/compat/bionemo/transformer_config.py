"""``TransformerConfig``: megatron-core's own where it is installed, else a stand-in for it.

The stand-in has the fields that configs of BioNeMo and NeMo set, with megatron-core's defaults, and
computes from the sizes what megatron-core computes from them. It draws no weights: its
``init_method`` stays what it was set to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from bioinit.backends.megatron import imported
from bioinit.errors import ConfigError


class Contradiction(ConfigError, ValueError):
    """Fields of a config that cannot both hold."""


@dataclass
class StandIn:
    """Stands in for ``megatron.core.transformer.TransformerConfig`` where that is not installed."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    moe_extended_tp: bool = False
    perform_initialization: bool = True
    use_cpu_initialization: bool = False
    fp16: bool = False
    bf16: bool = False
    params_dtype: torch.dtype = torch.float32
    timers: Callable[..., Any] | None = None
    finalize_model_grads_func: Callable[..., Any] | None = None
    grad_scale_func: Callable[..., Any] | None = None
    no_sync_func: Callable[..., Any] | None = None
    grad_sync_func: Callable[..., Any] | None = None
    param_sync_func: Callable[..., Any] | None = None
    deterministic_mode: bool = False
    enable_autocast: bool = False
    autocast_dtype: torch.dtype | None = None
    gradient_accumulation_fusion: bool = False
    async_tensor_model_parallel_allreduce: bool = True
    tp_comm_overlap: bool = False
    cross_entropy_loss_fusion: bool = False
    pipeline_dtype: torch.dtype | None = None
    variable_seq_lengths: bool = False
    overlap_p2p_comm: bool = False
    batch_p2p_comm: bool = True
    deallocate_pipeline_outputs: bool = False
    cpu_offloading: bool = False
    num_layers: int = 0
    mtp_num_layers: int | None = None
    hidden_size: int = 0
    num_attention_heads: int = 0
    softmax_scale: float | None = None
    num_query_groups: int | None = None
    ffn_hidden_size: int | None = None
    kv_channels: int | None = None
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    fp32_residual_connection: bool = False
    apply_residual_connection_post_layernorm: bool = False
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    gated_linear_unit: bool = False
    activation_func: Callable[..., Any] = functional.gelu
    num_moe_experts: int | None = None
    rotary_interleaved: bool = False
    window_size: tuple[int, int] | None = None
    normalization: str = "LayerNorm"
    qk_layernorm: bool = False
    test_mode: bool = False
    calculate_per_token_loss: bool = False
    multi_latent_attention: bool = False
    init_method: Callable[..., Any] | None = None
    output_layer_init_method: Callable[..., Any] | None = None
    init_method_std: float = 0.02
    apply_query_key_layer_scaling: bool = False
    attention_softmax_in_fp32: bool = True
    bias_activation_fusion: bool = False
    masked_softmax_fusion: bool = False
    persist_layer_norm: bool = False
    memory_efficient_layer_norm: bool = False
    bias_dropout_fusion: bool = False
    apply_rope_fusion: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    distribute_saved_activations: bool | None = False
    fp8: str | None = None
    fp8_margin: int = 0
    fp8_interval: int = 1
    fp8_amax_history_len: int = 1
    fp8_amax_compute_algo: str = "most_recent"
    fp8_wgrad: bool = True
    fp8_dot_product_attention: bool = False
    fp8_multi_head_attention: bool = False
    tp_only_amax_red: bool = False
    moe_shared_expert_intermediate_size: int | None = None
    moe_layer_freq: int | list[int] = 1
    moe_ffn_hidden_size: int | None = None
    moe_router_load_balancing_type: str = "aux_loss"
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    moe_grouped_gemm: bool = False
    moe_aux_loss_coeff: float = 0.0
    moe_z_loss_coeff: float | None = None
    moe_input_jitter_eps: float | None = None
    moe_token_dispatcher_type: str = "allgather"
    moe_expert_capacity_factor: float | None = None
    cp_comm_type: str | None = None
    enable_cuda_graph: bool = False
    clone_scatter_output_in_embedding: bool = True
    flash_decode: bool = False
    config_logger_dir: str = ""

    def __post_init__(self) -> None:
        if self.fp16 and self.bf16:
            raise Contradiction(
                "fp16 and bf16 are both set, and a model computes in one of them. Set one."
            )
        if self.num_attention_heads % self.tensor_model_parallel_size:
            raise Contradiction(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"tensor_model_parallel_size ({self.tensor_model_parallel_size}). Change one."
            )
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = 4 * self.hidden_size
        if self.kv_channels is None and self.num_attention_heads:
            self.kv_channels = self.hidden_size // self.num_attention_heads
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.expert_tensor_parallel_size is None:
            self.expert_tensor_parallel_size = self.tensor_model_parallel_size
        if self.autocast_dtype is None:
            self.autocast_dtype = self.params_dtype
        if self.num_moe_experts is not None and self.moe_ffn_hidden_size is None:
            self.moe_ffn_hidden_size = self.ffn_hidden_size
        if self.apply_query_key_layer_scaling:
            self.attention_softmax_in_fp32 = True


def find() -> Any:
    """Megatron-core's class, or the stand-in where megatron-core is not installed."""
    try:
        return imported("megatron.core.transformer").TransformerConfig
    except ConfigError:
        return StandIn
