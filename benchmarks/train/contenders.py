"""The contenders of the training benchmark: each returns a function that runs one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from ds_testkit.models import Transformer
from torch import Tensor, nn


class Workload(NamedTuple):
    """One training step, the same for every contender."""

    dim: int
    layers: int
    tokens: int  # per rank and micro-batch
    accumulation: int
    clip: float  # 0: none
    bf16: bool

    def model(self) -> Transformer:
        torch.manual_seed(0)
        return Transformer(256, self.dim, self.layers, heads=self.dim // 64, context=self.tokens)

    def batches(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(dist.get_rank())
        return [torch.randint(256, (1, self.tokens), generator=generator) for _ in range(self.accumulation)]


Step = Callable[[], None]


def floor(work: Workload) -> Step:
    """The same processes, training without any synchronisation."""
    return _plain(work, lambda model: model)


def ddp(work: Workload) -> Step:
    """Torch DistributedDataParallel, gradients as bucket views, fused AdamW."""
    return _plain(work, lambda model: nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True))


def _plain(work: Workload, wrap: Callable[[nn.Module], nn.Module]) -> Step:
    inner = work.model()
    masters = [p.detach().clone().requires_grad_() for p in inner.parameters()] if work.bf16 else None
    if work.bf16:
        inner.bfloat16()
    model, params, batches = wrap(inner), list(inner.parameters()), work.batches()
    optimizer = torch.optim.AdamW(masters or params, lr=1e-4, fused=True)

    def step() -> None:
        for index, batch in enumerate(batches):
            # DDP sends once per step: the passes before the last only add up
            if isinstance(model, nn.parallel.DistributedDataParallel):
                model.require_backward_grad_sync = index == len(batches) - 1
            (model(batch) / len(batches)).backward()
        if work.clip:
            nn.utils.clip_grad_norm_(params, work.clip)
        if masters:
            for master, param in zip(masters, params, strict=True):
                master.grad = param.grad.float()
        optimizer.step()
        optimizer.zero_grad()
        if masters:
            with torch.no_grad():
                torch._foreach_copy_(params, masters)
            for param in params:
                param.grad = None

    return step


def fsdp2(work: Workload) -> Step:
    """Torch fully_shard, one group per block and one for the rest, fused AdamW."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, batches = work.model(), work.batches()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if work.bf16 else None)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        for batch in batches:
            (model(batch) / len(batches)).backward()
        if work.clip:
            nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed(work: Workload, stage: int) -> Step:
    """DeepSpeed at one stage, torch's fused AdamW."""
    import deepspeed as ds

    model, batches = work.model(), work.batches()
    engine, _, _, _ = ds.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": work.accumulation,
            "gradient_clipping": work.clip,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": work.bf16},
        },
    )

    def step() -> None:
        for batch in batches:
            engine.backward(engine(batch))
            engine.step()

    return step


def ours(work: Workload, stage: int, *, host_memory: bool = True) -> Step:
    """ds-core with ds-zero and ds-kernels; without ``host_memory``, gloo carries the data as for the peers."""
    import ds_core

    engine, _, _, _ = ds_core.initialize(
        model=work.model(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": work.accumulation,
            "gradient_clipping": work.clip,
            "zero_optimization": {"stage": stage, "host_memory": host_memory},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "bf16": {"enabled": work.bf16},
        },
    )
    batches = work.batches()

    def step() -> None:
        for batch in batches:
            engine.backward(engine(batch))
            engine.step()

    return step


def ours_alone(work: Workload, stage: int) -> Step:
    """ds-zero alone, torch's fused AdamW."""
    import ds_zero

    model, batches = work.model(), work.batches()
    sharded = ds_zero.shard(
        model,
        lambda groups: torch.optim.AdamW(groups, lr=1e-4, fused=True),
        config=ds_zero.ZeroConfig(stage=stage),
        precision=ds_zero.Precision(compute=torch.bfloat16 if work.bf16 else None),
    )

    def step() -> None:
        for batch in batches:
            model(batch).backward()
        scale = min(1.0, work.clip / sharded.grad_norm().value) if work.clip else 1.0
        sharded.step(scale)

    return step


def backend_of(name: str) -> str:
    """Return what a contender's ranks communicate over: gloo, or for ``-shm`` ds-comm's shared memory."""
    return "ds_shm" if name.endswith("-shm") else "gloo"


CONTENDERS: dict[str, Callable[[Workload], Step]] = {
    "floor": floor,
    "ddp": ddp,
    "fsdp2": fsdp2,
    **{f"deepspeed-{stage}": (lambda work, stage=stage: deepspeed(work, stage)) for stage in (1, 2, 3)},
    **{f"ds-{stage}": (lambda work, stage=stage: ours(work, stage)) for stage in (1, 2, 3)},
    **{f"ds-{stage}-gloo": (lambda work, stage=stage: ours(work, stage, host_memory=False)) for stage in (1, 2, 3)},
    "ddp-shm": ddp,
    **{f"ds-{stage}-shm": (lambda work, stage=stage: ours(work, stage)) for stage in (1, 2, 3)},
    **{f"ds-zero-{stage}": (lambda work, stage=stage: ours_alone(work, stage)) for stage in (1, 2, 3)},
}
