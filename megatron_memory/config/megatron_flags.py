"""Flags that Megatron-LM has and this program has not: why each is refused, or has no effect.

Names are written as keys, with underscores; a name that ends in `*` stands for a whole family.
A family is only listed so where none of our own flags begins alike, so that a misspelt flag of ours
is still answered with the nearest one.
"""

import dataclasses
from collections.abc import Sequence
from functools import cache


@dataclasses.dataclass(frozen=True)
class _Accepted:
    """A flag whose effect is there anyway, or does not matter here."""

    why: str
    values: tuple[str, ...] | None = None
    """The values for which that holds; None: for all."""


def why_accepted(key: str, values: Sequence[str]) -> str | None:
    """Why a flag of Megatron-LM, given with these values, needs no action; None if it does."""
    accepted = _ACCEPTED.get(key.lower())
    if accepted is None:
        return None
    if accepted.values is not None and not set(values) <= set(accepted.values):
        return None
    return accepted.why


def why_refused(key: str) -> str | None:
    """Why a flag of Megatron-LM is not supported, and what to do; None for an unknown name."""
    name = key.lower()
    exact, families = _refused()
    if name in exact:
        return exact[name]
    accepted = _ACCEPTED.get(name)
    if accepted is not None:
        return f"only the value {' or '.join(accepted.values or ())} works here ({accepted.why})"
    return next((why for prefix, why in families.items() if name.startswith(prefix)), None)


@cache
def _refused() -> tuple[dict[str, str], dict[str, str]]:
    """Name -> reason, and family prefix -> reason."""
    exact: dict[str, str] = {}
    families: dict[str, str] = {}
    for why, names in _REFUSED.items():
        for name in names.split():
            target = families if name.endswith("*") else exact
            assert name.removesuffix("*") not in target, f"{name} has two reasons"
            target[name.removesuffix("*")] = why
    return exact, families


_FUSIONS = "which operations are fused is chosen for the device; results differ by rounding only"
_LAYOUT = "checkpoints are always sharded over all ranks and load at any layout"
_SIGNALS_SAVE = "SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 always save a checkpoint and exit"
_ALWAYS_LOGGED = "it is always reported, at every --log-interval"

_ACCEPTED = {
    "use_mcore_models": _Accepted("every model is built from megatron-core"),
    "no_masked_softmax_fusion": _Accepted(_FUSIONS),
    "no_bias_gelu_fusion": _Accepted(_FUSIONS),
    "no_bias_swiglu_fusion": _Accepted(_FUSIONS),
    "no_bias_dropout_fusion": _Accepted(_FUSIONS),
    "no_rope_fusion": _Accepted(_FUSIONS),
    "no_persist_layer_norm": _Accepted(_FUSIONS),
    "no_gradient_accumulation_fusion": _Accepted(_FUSIONS),
    "no_async_tensor_model_parallel_allreduce": _Accepted(_FUSIONS),
    "attention_backend": _Accepted("the attention kernel is chosen for the device", ("auto",)),
    "rope_type": _Accepted("rotary embeddings are always plain", ("rope",)),
    "softmax_type": _Accepted("attention's softmax is always plain", ("vanilla",)),
    "exit_signal_handler": _Accepted(_SIGNALS_SAVE),
    "exit_signal": _Accepted(_SIGNALS_SAVE, ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")),
    "log_throughput": _Accepted(_ALWAYS_LOGGED),
    "log_memory_to_tensorboard": _Accepted(_ALWAYS_LOGGED),
    "tensorboard_log_interval": _Accepted("curves are written at every --log-interval"),
    "tensorboard_queue_size": _Accepted("curves are written at every --log-interval"),
    "timing_log_level": _Accepted("only whole iterations are timed", ("0",)),
    "no_one_logger": _Accepted("that service is never used"),
    "dataloader_type": _Accepted("samples are read once, in their shuffled order", ("single",)),
    "data_impl": _Accepted("datasets are always memory-mapped", ("mmap", "infer")),
    "num_dataset_builder_threads": _Accepted("datasets are built by one thread", ("1",)),
    "no_create_attention_mask_in_dataloader": _Accepted("attention is causal without a mask"),
    "use_dist_ckpt": _Accepted(_LAYOUT),
    "dist_ckpt_format": _Accepted(_LAYOUT, ("torch_dist",)),
    "auto_detect_ckpt_format": _Accepted(_LAYOUT),
    "ckpt_fully_parallel_save": _Accepted(_LAYOUT),
    "ckpt_fully_parallel_load": _Accepted(_LAYOUT),
    "dist_ckpt_optim_fully_reshardable": _Accepted(_LAYOUT),
    "async_strategy": _Accepted("megatron-core writes the checkpoints", ("mcore",)),
    "local_rank": _Accepted("torchrun tells each process its rank"),
    "ddp_impl": _Accepted("the data-parallel wrapper is megatron-core's", ("local",)),
    "empty_unused_memory_level": _Accepted("cached GPU memory is kept", ("0",)),
    "num_distributed_optimizer_instances": _Accepted(
        "the optimizer's state is spread over all data-parallel ranks", ("1",)
    ),
    "enable_msc": _Accepted("files are read from the file system only"),
    "disable_msc": _Accepted("files are read from the file system only"),
}

_REFUSED = {
    "pipelines are laid out by --pipeline-model-parallel-layout and the flags beside it": """
        pipeline_model_parallel_split_rank standalone_embedding_stage
        encoder_pipeline_model_parallel_size encoder_tensor_model_parallel_size""",
    "interleaving is asked for by --num-virtual-stages-per-pipeline-rank": """
        virtual_pipeline_model_parallel_size""",
    "stages send to each other in megatron-core's default way": """
        pipeline_model_parallel_comm_backend overlap_p2p_communication_warmup_flush
        use_ring_exchange_p2p no_scatter_gather_tensors_in_pipeline
        defer_embedding_wgrad_compute wgrad_deferral_limit""",
    "gradients are reduced and weights gathered as soon as they can be": """
        no_align_grad_reduce no_align_param_gather disable_align_grad_reduce
        overlap_param_gather_with_optimizer_step delay_param_gather no_delay_grad_reduce""",
    "ranks are numbered tensor-, context-, data-, then pipeline-parallel": "use_tp_pp_dp_mapping",
    "context parallelism passes keys round a ring; use --context-parallel-size alone": """
        cp_comm_type hierarchical_context_parallel_sizes hybrid_context_parallel
        max_seqlen_per_dp_cp_rank""",
    "training runs in fp32 or bf16; use --bf16": """
        fp16 fp16_lm_cross_entropy loss_scale initial_loss_scale min_loss_scale loss_scale_window
        hysteresis""",
    "8-bit and 4-bit training needs Transformer Engine and is not built; use --bf16": """
        fp8_* fp4_* no_fp8_wgrad disable_fp8_wgrad first_last_layers_bf16
        num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 te_precision_config_file
        keep_fp8_transpose_cache keep_fp8_transpose_cache_when_using_custom_fsdp
        reuse_grad_buf_for_mxfp8_param_ag kitchen_* use_kitchen_attention""",
    "number formats are set by --bf16 and --accumulate-allreduce-grads-in-fp32 alone": """
        main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype
        use_precision_aware_optimizer fp32_residual_connection embedding_weights_in_fp32
        output_logit_dtype disable_bf16_reduced_precision_matmul
        ddp_reduce_scatter_with_fp32_accumulation
        ddp_param_name_patterns_for_fp32_local_accumulation""",
    "the attention kernel comes with the layers; use --transformer-impl transformer_engine": """
        use_flash_attn flash_attention_version flash_decode symmetric_ar_type
        use_transformer_engine_op_fuser use_te_activation_func te_rng_tracker use_te_rng_tracker""",
    "attention is multi-head or grouped-query; use --num-query-groups": """
        multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
        cache_mla_latents mla_down_proj_fusion rotary_scaling_factor mscale mscale_all_dim
        attention_output_gate experimental_attention_variant linear_attention_freq linear_conv_*
        linear_key_head_dim linear_value_head_dim linear_num_* dsa_* disable_dsa_* no_dsa_*
        window_size window_attn_skip_freq qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold
        log_max_attention_logit apply_query_key_layer_scaling no_query_key_layer_scaling""",
    "MLPs are GELU, or SiLU with a gate; use --swiglu": """
        squared_relu openai_gelu onnx_safe quick_geglu glu_linear_offset activation_func_clamp_value
        use_fused_weighted_squared_relu""",
    "rotary embeddings have no scaling; set --rotary-base and --rotary-percent": """
        rotary_seq_len_interpolation_factor no_rope_freq
        yarn_* no_yarn_* mrope_section relative_attention_*""",
    "positions are chosen by --position-embedding-type; use rope or none": "no_position_embedding",
    "norms are plain and stand before their block; use --normalization": """
        apply_layernorm_1p apply_residual_connection_post_layernorm fused_residual_rmsnorm""",
    "--init-method-std decides the initial weights, and the paper those of the memory": """
        init_method_xavier_uniform embedding_init_method_std use_cpu_initialization
        init_model_with_meta_device no_initialization data_parallel_random_init use_mup mup_*""",
    "layers are all of one kind but for memory layers and experts": """
        spec heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
        enable_mhc_connections mhc_* mamba_* disable_mamba_mem_eff_path is_hybrid_model
        hybrid_layer_pattern hybrid_override_pattern hybrid_attention_ratio hybrid_mlp_ratio
        gdp_*""",
    "multi-token prediction is not built": "mtp_*",
    "decoders only: give --num-layers and --seq-length": """
        encoder_num_layers decoder_num_layers encoder_seq_length decoder_seq_length""",
    "language models on text only": """
        vision_* dino_* swin_* img_* num_channels num_classes patch_dim mask_type mask_factor
        classes_fraction data_per_class_fraction no_data_sharding head_lr_mult iter_per_epoch""",
    "BERT, T5 and retrieval models are not built: the model is a GPT": """
        bert_* output_bert_embeddings retro_* biencoder_* ict_* titles_data_path evidence_data_path
        query_in_block_prob use_one_sent_docs retriever_* block_data_path embedding_path indexer_*
        mask_prob short_seq_prob sample_rate vocab_extra_ids""",
    "reinforcement learning and supervised finetuning have no program here": """
        perform_rl_step rl_* grpo_* langrl_* refit_method sft sft_tokenizer_prompt_format
        chat_template""",
    "adapters and frozen layers are not built; --finetune trains all weights": """
        freeze_all_layers""",
    "distillation is not built": "logits_save_* logits_load_*",
    "text is generated by `python -m megatron_memory.generate`": """
        inference_* max_tokens_to_oom decode_only_cuda_graphs enable_chunked_prefill
        disable_chunked_prefill num_speculative_tokens use_legacy_static_engine
        use_same_sampling_seed_across_dp_ranks mlp_chunks_for_prefill nccl_all_reduce_for_prefill
        batch_invariant_*""",
    "experts are a baseline with softmax routing, no capacity limit and no shared expert": """
        moe_apply_probs_on_input moe_combine_bwd_dtype moe_deepep_num_sms moe_dispatch_fwd_dtype
        moe_enable_deepep moe_enable_routing_replay moe_expert_capacity_factor
        moe_expert_rank_capacity_factor moe_extended_tp moe_flex_* moe_hybridep_*
        moe_input_jitter_eps moe_latent_size moe_mlp_glu_interleave_size moe_ncclep_zero_copy
        moe_pad_* moe_paged_* moe_per_layer_logging moe_permute_fusion
        moe_permute_fusion_into_hybridep moe_router_bias_update_rate moe_router_dtype
        moe_router_enable_expert_bias moe_router_force_biased moe_router_force_load_balancing
        moe_router_fusion moe_router_group_topk moe_router_num_groups moe_router_padding_*
        moe_router_pre_softmax moe_router_quantile_balancing_ema moe_router_score_function
        moe_router_topk_scaling_factor moe_routing_* moe_shared_*
        moe_single_* moe_token_drop_policy moe_token_dropping moe_upcycling_granularity
        moe_use_grouped_tensor moe_use_legacy_grouped_gemm moe_use_upcycling moe_z_loss_coeff
        overlap_moe_expert_parallel_comm overlap_dispatch_backward_with_experts_wgrad
        ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream
        use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
        expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards""",
    "recompute is set by --recompute-granularity and --recompute-modules": """
        checkpoint_activations checkpoint_num_layers distribute_checkpointed_activations
        distribute_saved_activations moe_layer_recompute mlp_chunks_for_training""",
    "activations and weights stay on the device; use --recompute-granularity to save memory": """
        cpu_offloading_* activation_offload_fraction delay_offload_until_cuda_graph
        delta_offload_bytes_across_pp_ranks fine_grained_* min_offloaded_tensor_size
        offload_modules optimizer_cpu_offload optimizer_offload_fraction
        use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d no_pin_cpu_*""",
    "fully sharded data parallelism is not built; use --use-distributed-optimizer": """
        use_megatron_fsdp use_torch_fsdp2 use_custom_fsdp megatron_fsdp_* fsdp_*
        torch_fsdp2_no_reshard_after_forward data_parallel_sharding_strategy
        outer_dp_sharding_strategy enable_full_sharding_in_hsdp create_all_gather_group
        suggested_communication_unit_size no_strict_fsdp_dtensor_load
        disable_strict_fsdp_dtensor_load gtp_* expert_gtp_weight_remat_size
        tensor_parallel_num_weight_shards no_use_layer_wise_param_layout""",
    "communication has no further settings: leave the flag away": """
        tp_comm_* no_tp_comm_* disable_tp_comm_* ddp_average_in_collective ddp_bucket_size
        ddp_num_buckets ddp_pad_buckets_for_high_nccl_busbw no_gradient_reduce_div_fusion
        nccl_communicator_config_path use_nccl_ub disable_symmetric_registration use_sharp
        sharp_enabled_group high_priority_stream_groups disable_gloo_process_groups
        distributed_timeout_seconds_after_init delay_wgrad_compute lazy_mpu_init
        fake_process_group no_clone_scatter_output_in_embedding
        disable_clone_scatter_output_in_embedding use_contiguous_buffers_in_ddp
        no_contiguous_buffers_in_local_ddp""",
    "speed has no further settings: leave the flag away": """
        enable_cuda_graph external_cuda_graph cuda_graph_* optimizer_cuda_graph
        cross_entropy_loss_fusion cross_entropy_fusion_impl disable_jit_fuser manual_gc
        manual_gc_interval no_manual_gc_eval disable_manual_gc_eval train_sync_interval
        no_mmap_bin_files mmap_warmup dataloader_fast_cache_load
        dataloader_defer_npy_index_mmap""",
    "the batch size is constant: give --global-batch-size": """
        rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed
        phase_transition_iterations""",
    "the schedule counts iterations: give --train-iters and the --lr-...-iters flags": """
        train_samples lr_decay_samples lr_warmup_samples lr_wsd_decay_samples""",
    "Megatron-LM renamed it: see --help for --micro-batch-size, --lr-warmup-fraction, "
    "--tensor-model-parallel-size, --override-opt-param-scheduler": """
        batch_size warmup model_parallel_size override_lr_scheduler use_checkpoint_lr_scheduler""",
    "only the memory values have a learning rate of their own: --memory-value-lr": """
        decoupled_lr decoupled_min_lr""",
    "only adam and sgd are built: use --optimizer adam": """
        muon_* lion_* dump_param_to_param_group_map""",
    "weight decay applies to matrices, or to everything by --apply-weight-decay-to-all": """
        apply_wd_to_qk_layernorm no_weight_decay_cond_type""",
    "losses and gradients are always checked: see --on-bad-step and --loss-spike-factor": """
        no_check_for_nan_in_loss_and_grad check_for_large_grads check_for_spiky_loss""",
    "tests for faulty hardware are not built": """
        result_rejected_tracker_filename rerun_mode error_injection_rate error_injection_type
        gpu_sniff_test_interval""",
    "the memory's own operations are always deterministic; for the other layers use "
    "--transformer-impl local": "deterministic_mode",
    "the program trains, iteration after iteration; --dry-run only reports": """
        iterations_to_skip skip_train test_mode""",
    "evaluation has --eval-interval and --eval-iters, with the training's batch size": """
        full_validation multiple_validation_sets validation_set_names start_eval_at_iter
        eval_global_batch_size eval_micro_batch_size""",
    "datasets are given by --data-path, or --train-data-path and its companions": """
        data_args_path per_split_data_args_path per_dataset_sequences_path
        object_storage_cache_path s3_cache_path renormalize_blend_weights
        mid_level_dataset_surplus dataloader_inter_document_masking""",
    "there is no invented data: tokenise some text with tools/preprocess_data.py": "mock_data",
    "fill-in-the-middle is not built": "fim_*",
    "a tokenizer is given by --tokenizer-type and --tokenizer-model alone": """
        vocab_file merge_file tokenizer_hf_* tokenizer_metadata tokenizer_special_tokens
        tokenizer_sentencepiece_* no_tokenizer_* disable_tokenizer_* legacy_tokenizer tiktoken_*
        null_tokenizer_* allow_ambiguous_pad_tokens use_gigatoken""",
    "code in a tokenizer's folder is never run": "trust_remote_code",
    "the vocabulary is padded by --make-vocab-size-divisible-by": """
        padded_vocab_size no_pad_vocab_size disable_pad_vocab_size""",
    "flags and the configuration file decide; a checkpoint that does not fit is refused": """
        use_checkpoint_args use_mp_args_from_checkpoint_args
        no_use_tokenizer_model_from_checkpoint_args
        disable_use_tokenizer_model_from_checkpoint_args""",
    "settings are read from --config FILE.yaml": "yaml_cfg config_logger_dir",
    "the newest complete checkpoint of --load is taken": """
        ckpt_step override_ckpt_iteration pretrained_checkpoint load_model_opt_format""",
    "checkpoints have --save-interval and --keep-last alone": """
        non_persistent_* save_retain_interval save_params_interval save_activations_interval
        save_tokens_per_expert_interval save_wgrads_interval save_dgrads_interval replication
        replication_factor replication_jump no_save_tokenizer_assets disable_save_tokenizer_assets
        load_main_params_from_ckpt""",
    "checkpoints are torch_dist, with nothing further to set": """
        ckpt_convert_* ckpt_assume_constant_structure ckpt_drop_redundant_extra_state
        ckpt_fully_parallel_save_process_group ckpt_fully_parallel_load_exchange_algo
        ckpt_fully_parallel_load_process_group ckpt_fully_parallel_load_per_rank_objects
        ckpt_pg_tensors_cache_* no_ckpt_fully_parallel_save
        no_ckpt_load_validate_sharding_integrity disable_ckpt_load_validate_sharding_integrity
        dist_ckpt_workers dist_ckpt_strictness dist_ckpt_save_pre_mcore_014
        distrib_optim_fully_reshardable_mem_efficient use_persistent_ckpt_worker async_ckpt_*
        verify_integrity""",
    "curves go to TensorBoard: give --tensorboard-dir": """
        wandb_* enable_one_logger one_logger_* app_tag_* otel_*""",
    "what is reported is fixed: see --log-interval and --tensorboard-dir": """
        log_batch_size_to_tensorboard log_device_memory_used log_energy log_memory_interval
        log_num_zeros_in_grad log_params_norm log_progress log_timers_to_tensorboard
        log_validation_ppl_to_tensorboard log_world_size_to_tensorboard logging_level
        no_log_loss_scale_to_tensorboard disable_log_loss_scale_to_tensorboard
        no_log_learnig_rate_to_tensorboard timing_log_option
        no_barrier_with_level_1_timing""",
    "profile from outside, for example with nsys or py-spy": """
        profile profile_* pytorch_profiler_* use_pytorch_profiler nvtx_ranges record_shapes
        record_memory_history memory_snapshot_path""",
    "stop with SIGTERM and start again: --load resumes exactly where the run was": """
        adlr_autoresume adlr_autoresume_interval inprocess_* enable_ft_package calc_ft_timeouts
        ft_num_warmup_iters exit_signal_handler_for_dataloader exit_signal_handler_for_training""",
    "stragglers and hangs are not traced": """
        log_straggler straggler_* disable_straggler_on_startup run_workload_inspector_server
        flight_recorder_* no_flight_recorder_* disable_flight_recorder_*""",
    "models are built from megatron-core's released parts": "use_legacy_models enable_experimental",
}
