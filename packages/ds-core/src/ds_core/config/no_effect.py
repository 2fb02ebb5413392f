"""Keys that DeepSpeed has and that have no effect here, each with the reason.

A path that ends in ``.*`` stands for all keys below it. Nothing here changes what a run computes; what would
is in ``unavailable.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

_BUFFERS = "units of parameters have fixed buffers, so there is no size to tune"
_LIFETIME = "at most two units of parameters are whole at a time, whatever the model"
_COLLECTED = "gradients are collected in one buffer for each unit and sent as soon as their unit is done"
_ONE_WAY = "there is one way of communicating, and it needs no switch"
_OFFLOAD = "nothing is offloaded while device is 'none'"
_FORMAT = "checkpoints have one format, which loads on any number of ranks"
_LOGGING = "set the level of the logger 'ds_core' instead"
_QUIET = "nothing is printed: Engine.step() returns what it did"
_RANGES = "phases are ranges 'ds.forward', 'ds.backward', 'ds.step' in torch.profiler"
_OFF = "the feature is off"
_HEADS = "heads are never cut, so there is no grain to tune"
_AXES = "neighbouring ranks share a layer"
_STAGES = "a PipelineModule is told when it is made: PipelineModule(..., partition_method=, seed_layers=)"
_MESSAGES = "what stages hand on is not partitioned"
_MATCHING = "gradients are summed in float32 and scaled once, so this cannot change the mean"

NO_EFFECT: Mapping[str, str] = {
    # Partitioning.
    "zero_optimization.allgather_bucket_size": _BUFFERS,
    "zero_optimization.allgather_partitions": _ONE_WAY,
    "zero_optimization.allgather_sequential": _ONE_WAY,
    "zero_optimization.compute_grad_norm": "the norm is always computed",
    "zero_optimization.contiguous_gradients": _COLLECTED,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.elastic_checkpoint": _FORMAT,
    "zero_optimization.enable_sanity_checks": "wrong orders of calls are always errors",
    "zero_optimization.gather_16bit_weights_on_model_save": "whole weights can be saved at any time",
    "zero_optimization.ignore_unused_parameters": "unused parameters are always allowed",
    "zero_optimization.leaf_module.*": "modules are grouped into units instead",
    "zero_optimization.legacy_stage1": "there is one stage 1",
    "zero_optimization.load_from_fp32_weights": "checkpoints hold the float32 weights, and they are loaded",
    "zero_optimization.log_trace_cache_warnings": "there is no trace that could become invalid",
    "zero_optimization.max_live_parameters": _LIFETIME,
    "zero_optimization.max_reuse_distance": _LIFETIME,
    "zero_optimization.memory_efficient_linear": "torch's linear layer needs no replacement",
    "zero_optimization.model_persistence_threshold": _LIFETIME,
    "zero_optimization.module_granularity_threshold": "modules are grouped into units instead",
    "zero_optimization.offload_optimizer.buffer_count": _OFFLOAD,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _OFFLOAD,
    "zero_optimization.offload_optimizer.fast_init": _OFFLOAD,
    "zero_optimization.offload_optimizer.nvme_path": _OFFLOAD,
    "zero_optimization.offload_optimizer.pin_memory": _OFFLOAD,
    "zero_optimization.offload_optimizer.pipeline_read": _OFFLOAD,
    "zero_optimization.offload_optimizer.pipeline_write": _OFFLOAD,
    "zero_optimization.offload_optimizer.ratio": _OFFLOAD,
    "zero_optimization.offload_optimizer.super_offload": _OFFLOAD,
    "zero_optimization.offload_param.buffer_count": _OFFLOAD,
    "zero_optimization.offload_param.buffer_size": _OFFLOAD,
    "zero_optimization.offload_param.max_in_cpu": _OFFLOAD,
    "zero_optimization.offload_param.nvme_path": _OFFLOAD,
    "zero_optimization.offload_param.pin_memory": _OFFLOAD,
    "zero_optimization.overlap_comm": "communication always overlaps with computation",
    "zero_optimization.override_module_apply": "Module.apply is torch's own",
    "zero_optimization.param_persistence_threshold": "small parameters travel with their unit",
    "zero_optimization.parameter_alignment": "shards are always aligned",
    "zero_optimization.pipeline_loading_checkpoint": _FORMAT,
    "zero_optimization.prefetch_bucket_size": _BUFFERS,
    "zero_optimization.reduce_bucket_size": _BUFFERS,
    "zero_optimization.reduce_scatter": _ONE_WAY,
    "zero_optimization.round_robin_gradients": _COLLECTED,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _OFFLOAD,
    "zero_optimization.stage3_allgather_sequential": _ONE_WAY,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "whole weights can be saved at any time",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "whole weights can be saved at any time",
    "zero_optimization.stage3_max_live_parameters": _LIFETIME,
    "zero_optimization.stage3_max_reuse_distance": _LIFETIME,
    "zero_optimization.stage3_model_persistence_threshold": _LIFETIME,
    "zero_optimization.stage3_module_granularity_threshold": "modules are grouped into units instead",
    "zero_optimization.stage3_param_persistence_threshold": "small parameters travel with their unit",
    "zero_optimization.stage3_prefetch_bucket_size": _BUFFERS,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _ONE_WAY,
    "zero_optimization.sub_group_size": "the optimizer steps unit by unit",
    "zero_optimization.use_all_reduce_for_fetch_params": _ONE_WAY,
    "zero_optimization.use_multi_rank_bucket_allreduce": _ONE_WAY,
    "aio.block_size": _OFFLOAD,
    "aio.intra_op_parallelism": _OFFLOAD,
    "aio.overlap_events": _OFFLOAD,
    "aio.queue_depth": _OFFLOAD,
    "aio.single_submit": _OFFLOAD,
    "aio.thread_count": _OFFLOAD,
    "aio.use_gds": _OFFLOAD,
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "zero_allow_untested_optimizer": "a class that nobody knows is stepped as whole tensors, which needs no permission",
    # Communication and precision.
    "communication_data_type": "gradients travel in the type they were computed in, and are summed in float32",
    "disable_allgather": _ONE_WAY,
    "gradient_predivide_factor": _MATCHING,
    "prescale_gradients": _MATCHING,
    "seq_parallel_communication_data_type": "sequences are not split over ranks",
    "bf16.immediate_grad_update": _COLLECTED,
    "optimizer.legacy_fusion": "there is one fused implementation",
    "amp.*": _OFF,
    "msamp.*": "it is read by Hugging Face Accelerate, not here",
    "torch_autocast.dtype": _OFF,
    "torch_autocast.lower_precision_safe_modules": _OFF,
    "vocabulary_size": "it only served to warn about a size that is slow on some devices",
    # Checkpoints.
    "checkpoint.checkpoint_serialization": _FORMAT,
    "checkpoint.load_universal": _FORMAT,
    "checkpoint.tag_validation": "ranks that save under different tags are always an error",
    "checkpoint.parallel_write.pipeline_stage": "all ranks write their own share",
    "checkpoint.writer.*": "shards are always streamed to files",
    # Logs and profiles.
    "comms_logger.debug": _OFF,
    "comms_logger.prof_all": _OFF,
    "comms_logger.prof_ops": _OFF,
    "comms_logger.verbose": _OFF,
    "disable_python_gc": "the garbage collector is never touched",
    "dump_state": "'ds config check' prints the effective configuration",
    "flops_profiler.detailed": _OFF,
    "flops_profiler.module_depth": _OFF,
    "flops_profiler.output_file": _OFF,
    "flops_profiler.profile_step": _OFF,
    "flops_profiler.recompute_fwd_factor": _OFF,
    "flops_profiler.top_modules": _OFF,
    "log_level": _LOGGING,
    "memory_breakdown": "torch's memory profiler shows it",
    "steps_per_print": _QUIET,
    "timers.throughput.enabled": _QUIET,
    "timers.throughput.synchronized": _QUIET,
    "wall_clock_breakdown": _RANGES,
    "csv_monitor.job_name": _OFF,
    "csv_monitor.output_path": _OFF,
    "comet.*": _OFF,
    "tensorboard.job_name": _OFF,
    "tensorboard.output_path": _OFF,
    "wandb.group": _OFF,
    "wandb.project": _OFF,
    "wandb.team": _OFF,
    # Features that are off: their other keys.
    "autotuning.*": _OFF,
    "compile.*": _OFF,
    "curriculum_learning.*": _OFF,
    "data_efficiency.*": _OFF,
    "eigenvalue.*": _OFF,
    "elasticity.*": _OFF,
    "expert_parallel.*": _OFF,
    "hybrid_engine.*": _OFF,
    "nebula.*": _OFF,
    "pipeline.grad_partitioned": _MESSAGES,
    "pipeline.partition": _STAGES,
    "pipeline.pipe_partitioned": _MESSAGES,
    "pipeline.seed_layers": _STAGES,
    "progressive_layer_drop.*": _OFF,
    "quantize_training.*": _OFF,
    "tensor_parallel.dtype": "sections fp16 and bf16 say what is computed in",
    "tensor_parallel.keep_module_on_host": "a model is split where it was built, before it is moved",
    "tensor_parallel.tensor_parallel.tp_grain_size": _HEADS,
    "tensor_parallel.tp.mpu": _AXES,
    "tensor_parallel.tp.tp_grain_size": _HEADS,
    "tensor_parallel.tp.tp_group": _AXES,
    "tensor_parallel.tp_overlap_comm": _ONE_WAY,
    "tensor_parallel.vocab_parallel_ce_backend": "the logits are gathered, and the loss is the model's",
}
"""Dotted path of the key, and why it has no effect."""
