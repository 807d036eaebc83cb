"""Fields of Megatron's configs that say how something ran, and not what the model is.

Each name stands under the one reason that is true of it. What a field of a model means, however
rare, is not here: families name it, map it or refuse other values of it. A pattern ends in ``*``.

From megatron-core 0.8 to 0.16.1 (``TransformerConfig``, ``ModelParallelConfig``), NeMo 2.0 to 2.5
(``GPTConfig``), NeMo 1.2x (``megatron_gpt_config.yaml``) and Megatron-Bridge's providers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_PARALLEL = "it says how the model was divided among processes"
_PIPELINE = "it says how a pipeline of processes took turns"
_COMMUNICATION = "it says how processes talked to one another"
_KERNEL = "it chooses a kernel that computes the same"
_PRECISION = "it says in which precision something was computed; stored tensors say their own"
_DTYPE = "every tensor says its own dtype"
_LOW = "it says how eight or four bits stood for numbers while it ran"
_MEMORY = "it trades memory for time"
_GRAPH = "it says what was recorded as a CUDA graph"
_INIT = "it says how weights were drawn before training; init_method_std is mapped"
_LOSS = "it belongs to the loss and not to the model"
_HOOK = "it is a function that the trainer had set"
_CODE = "it names code that assembles the layers; the tensors' names say which"
_INFERENCE = "it says how the model was run after training"
_DEBUG = "it helps to find mistakes"
_DATA = "it says what the model was trained on, and how"
_OPTIMIZER = "it says how the model was optimized"
_TRAINER = "it says how the run was set up"
_SCORES = "it divides the scores and multiplies them again, which is the same"
_EXPERTS = "it says how experts were run or trained; this family has none"
_ROUTING = "it says how experts were run or trained"
_STATE_SPACE = "it belongs to layers of a state space model, which this family does not have"
_HEADS = "it belongs to heads that predict further tokens, which this model does not have"
_LINEAR = "it belongs to linear attention, which this family does not have"
_TOKENIZER = "the tokenizer's files go along as files"

_FIELDS = {
    _PARALLEL: """
        tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        virtual_pipeline_model_parallel_size expert_model_parallel_size
        expert_tensor_parallel_size moe_extended_tp sequence_parallel use_cpu_initialization
        hierarchical_context_parallel_sizes cp_comm_type hetereogenous_dist_checkpoint
        hybrid_context_parallel max_seqlen_per_dp_cp_rank scatter_embedding_sequence_parallel
        parallel_output clone_scatter_output_in_embedding data_parallel_size world_size
        pipeline_model_parallel_split_rank""",
    _PIPELINE: """
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        num_layers_per_virtual_pipeline_stage
        pipeline_model_parallel_layout pipeline_dtype pipeline_model_parallel_comm_backend
        microbatch_group_size_per_vp_stage overlap_p2p_comm overlap_p2p_comm_warmup_flush
        batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p variable_seq_lengths
        defer_embedding_wgrad_compute wgrad_deferral_limit deallocate_pipeline_outputs
        num_microbatches_with_partial_activation_checkpoints delay_wgrad_compute
        overlap_moe_expert_parallel_comm ep_overlap_early_attn_memory_release mtp_standalone""",
    _COMMUNICATION: """
        async_tensor_model_parallel_allreduce tp_comm_* symmetric_ar_type tp_only_amax_red
        barrier_with_L1_time finalize_model_grads_func""",
    _KERNEL: """
        attention_backend apply_rope_fusion fused_single_qkv_rope bias_activation_fusion
        bias_dropout_fusion bias_dropout_add_fusion masked_softmax_fusion persist_layer_norm
        memory_efficient_layer_norm gradient_accumulation_fusion cross_entropy_loss_fusion
        cross_entropy_fusion_impl use_fused_weighted_squared_relu use_te_activation_func
        use_transformer_engine_op_fuser transformer_impl use_kitchen use_kitchen_attention
        kitchen_attention_backend flash_decode use_te_rng_tracker inference_rng_tracker
        use_mamba_mem_eff_path moe_permute_fusion moe_router_fusion batch_invariant_mode
        deterministic_mode disable_bf16_reduced_precision_matmul use_flash_attention
        bias_gelu_fusion bias_swiglu_fusion fused_weighted_squared_relu""",
    _DTYPE: "params_dtype fp16 bf16 autocast_dtype enable_autocast precision megatron_amp_O2",
    _PRECISION: """
        attention_softmax_in_fp32 fp32_residual_connection first_last_layers_bf16
        num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 native_amp_* hysteresis""",
    _SCORES: "apply_query_key_layer_scaling",
    _LOW: """
        fp8 fp8_* fp4 fp4_* fp8_param fp8_params activation_func_fp8_input_store quant_recipe
        disable_parameter_transpose_cache reduce_amax ub_tp_comm_*
        keep_fp8_weight_transpose_cache""",
    _MEMORY: """
        recompute_granularity recompute_method recompute_modules recompute_num_layers
        distribute_saved_activations cpu_offloading cpu_offloading_* _cpu_offloading_context
        fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
        activations_checkpoint_* num_micro_batches_with_partial_activation_checkpoints
        mlp_chunks_for_prefill mlp_chunks_for_training""",
    _GRAPH: "enable_cuda_graph external_cuda_graph cuda_graph_* use_cuda_graph",
    _INIT: """
        init_method output_layer_init_method embedding_init_method embedding_init_method_std
        perform_initialization init_model_with_meta_device use_scaled_init_method
        use_mup mup_*""",
    _LOSS: """
        fp16_lm_cross_entropy calculate_per_token_loss mtp_loss_scaling_factor
        log_max_attention_logit""",
    _HOOK: """
        grad_scale_func no_sync_func grad_sync_func param_sync_func forward_step_fn data_step_fn
        timers""",
    _CODE: """
        transformer_layer_spec use_transformer_engine_full_layer_spec mcore_gpt
        transformer_engine onnx_safe name target nemo_version model_type""",
    _INFERENCE: """
        inference_sampling_seed use_inference_optimized_layers inference_fuse_tp_communication
        generation_config inference inference_*""",
    _DEBUG: "config_logger_dir test_mode moe_per_layer_logging nsys_profile",
    _DATA: """
        data micro_batch_size global_batch_size rampup_batch_size seed mmap_* validation_*
        qk_clip qk_clip_*""",
    _OPTIMIZER: """
        optim grad_div_ar_fusion grad_allreduce_chunk_size_mb gradient_as_bucket_view
        do_layer_norm_weight_decay sync_batch_comm""",
    _TRAINER: """
        resume_from_checkpoint restore_from_path restore_from_ckpt apex_transformer_log_level
        get_attention_mask_from_fusion dist_ckpt_* exp_manager trainer peft
        pre_process post_process pretrained_checkpoint should_pad_vocab
        hf_model_id restore_modelopt_state use_emha sharp log_train_loss""",
    _STATE_SPACE: "mamba_*",
    _LINEAR: "linear_conv_kernel_dim linear_key_* linear_value_* linear_num_* dsa_*",
    _TOKENIZER: "tokenizer",
}
_MOE = """
    moe_apply_probs_on_input moe_aux_loss_coeff moe_deepep_num_sms moe_enable_deepep
    moe_expert_capacity_factor moe_grouped_gemm moe_input_jitter_eps moe_layer_recompute
    moe_pad_expert_input_to_capacity moe_router_bias_update_rate moe_router_dtype
    moe_router_force_load_balancing moe_router_load_balancing_type moe_router_padding_for_fp8
    moe_router_padding_for_quantization moe_shared_expert_overlap moe_token_dispatcher_type
    moe_token_drop_policy moe_token_dropping moe_use_legacy_grouped_gemm moe_z_loss_coeff
    moe_flex_dispatcher_backend moe_hybridep_num_sms moe_enable_routing_replay"""
_OF_EXPERTS = """
    moe_ffn_hidden_size moe_layer_freq moe_router_topk moe_router_topk_limited_devices
    moe_router_topk_scaling_factor moe_router_pre_softmax moe_router_score_function
    moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size"""


class Reasons(Mapping[str, str]):
    """Reasons by the name of a field; a pattern that ends in ``*`` stands for all it begins."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        starts = {k[:-1]: v for k, v in names.items() if k.endswith("*")}
        self._starts = dict(sorted(starts.items(), key=lambda pair: -len(pair[0])))

    def __getitem__(self, name: str) -> str:
        found = self._names.get(name)
        if found is None:
            found = next((why for at, why in self._starts.items() if name.startswith(at)), None)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __hash__(self) -> int:
        return id(self)


def _reasons(fields: Mapping[str, str]) -> Reasons:
    return Reasons({name: why for why, names in fields.items() for name in names.split()})


RUNTIME = _reasons({**_FIELDS, _ROUTING: _MOE})
"""For every family; what shapes experts is not here."""

DENSE = _reasons({**_FIELDS, _EXPERTS: _MOE + _OF_EXPERTS, _HEADS: "mtp_use_repeated_layer"})
"""For families without experts."""
