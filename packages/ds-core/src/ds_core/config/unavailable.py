"""Keys that ask for a feature which this version does not provide.

Each stands here with the values that do not ask for it (DeepSpeed's default among them): those are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..protocols import Json


class Feature(NamedTuple):
    """What a key asks for."""

    name: str  # the feature
    off: tuple[Json, ...]  # values that do not ask for it, beside null and "auto"
    wheel: str | None = None  # the wheel whose job it is, where there is one


_ROLE = "composing a plugin of the group {}"
_MONITOR = "writing scalars to {}"

UNAVAILABLE: Mapping[str, Feature] = {
    # Partitioning.
    "zero_optimization.cpu_offload": Feature("optimizer offload", (False,), "ds-offload"),
    "zero_optimization.cpu_offload_param": Feature("parameter offload", (False,), "ds-offload"),
    "zero_optimization.mics_hierarchical_params_gather": Feature("MiCS", (False,), "ds-zero"),
    "zero_optimization.offload_optimizer.device": Feature("optimizer offload", ("none",), "ds-offload"),
    "zero_optimization.offload_param.device": Feature("parameter offload", ("none",), "ds-offload"),
    "zero_optimization.zenflow": Feature("ZenFlow", (), "ds-offload"),
    "zero_optimization.zero_quantized_nontrainable_weights": Feature("quantized weights", (False,), "ds-comm"),
    # Plugins of roles that the engine is not built with.
    "attention": Feature(_ROLE.format("'ds.attention'"), (False, {})),
    "monitor": Feature(_ROLE.format("'ds.monitor'"), (False, {})),
    "store": Feature(_ROLE.format("'ds.store'"), (False, {})),
    # Other kinds of parallelism.
    "data_parallel_size": Feature("a mesh of data and sequence parallel ranks", ()),
    "expert_parallel.enabled": Feature("expert parallelism", (False,)),
    "sequence_parallel_size": Feature("sequence parallelism", (1,)),
    "tensor_parallel.injection_policy_tuple": Feature("layers to split by their classes", ()),
    "tensor_parallel.replace_with_kernel_inject": Feature("kernels in place of layers", (False,)),
    "use_data_before_expert_parallelism": Feature("expert parallelism", (False,)),
    # Precision and gradients.
    "amp.enabled": Feature("NVIDIA Apex; fp16 and bf16 do its job", (False,)),
    "bf16.bf16_master_weights_and_grads": Feature("training without float32 weights", (False,)),
    "bf16.bf16_optimizer_states": Feature("optimizer state in bfloat16", (False,)),
    "data_types.buffer_dtype": Feature("buffers in a data type of their own", ()),
    "data_types.param_dtype": Feature("parameters in a data type of their own", ()),
    "fp16.fp16_master_weights_and_grads": Feature("training without float32 weights", (False,)),
    "gradient_allreduce_op": Feature("a gradient that is not the mean over ranks", ("mean",)),
    "managed_gradient_accumulation": Feature("accumulation boundaries set by the caller", (True,)),
    "sparse_gradients": Feature("sparse gradients of embeddings", (False,)),
    "torch_autocast.enabled": Feature("torch.autocast; fp16 and bf16 cast the model", (False,)),
    # Memory and speed.
    "autotuning.enabled": Feature("autotuning", (False,)),
    "compile.deepcompile": Feature("compiled partitioning", (False,)),
    "compile.passes": Feature("compiled partitioning", ([],)),
    "compression_training": Feature("compression of the model", ({},)),
    "graph_harvesting": Feature("CUDA graphs of the whole step", (False,)),
    "hybrid_engine.enabled": Feature("inference between training steps", (False,)),
    "quantize_training.enabled": Feature("quantized training", (False,)),
    "sparse_attention": Feature("sparse attention by configuration", (), "ds-sparse-attn"),
    "weight_quantization": Feature("quantized weights", ({},)),
    # Data and schedules.
    "curriculum_learning.enabled": Feature("curriculum learning", (False,)),
    "data_efficiency.enabled": Feature("data efficiency", (False,)),
    "eigenvalue.enabled": Feature("eigenvalues of layers", (False,)),
    "elasticity.enabled": Feature("a batch size chosen for many world sizes", (False,)),
    "progressive_layer_drop.enabled": Feature("progressive layer drop", (False,)),
    # Checkpoints, logs and profiles.
    "checkpoint.use_node_local_storage": Feature("checkpoints on storage of each node", (False,)),
    "datastates_ckpt": Feature("checkpoints through DataStates", ({},)),
    "nebula.enabled": Feature("checkpoints through Nebula", (False,)),
    "comms_logger.enabled": Feature("a log of collectives", (False,)),
    "flops_profiler.enabled": Feature("a profile of floating-point operations", (False,)),
    "comet.enabled": Feature(_MONITOR.format("Comet"), (False,)),
    "csv_monitor.enabled": Feature(_MONITOR.format("CSV files"), (False,)),
    "tensorboard.enabled": Feature(_MONITOR.format("TensorBoard"), (False,)),
    "wandb.enabled": Feature(_MONITOR.format("Weights & Biases"), (False,)),
}
"""Dotted path of the key, and what it asks for."""
