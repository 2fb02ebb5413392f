"""Times steps of the fused optimizers and of AdamW's codecs against torch's and DeepSpeed's, alternating.

    python benchmarks/optimizers.py --threads 1 2 --out optimizers.md

Tasks. ``bf16 model``: AdamW on weights and gradients in bfloat16, with the master and moments that each contender
keeps. ``lamb``, ``lion``, ``adagrad``, ``sgd``: float32, against the same equations in ``torch._foreach`` ops, torch's
own class where there is one, and DeepSpeed's. Bytes are what the equations need, each array counted once per pass;
measured as in ``adamw.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from adamw import LR, Contender, axpy, header, line, measure, one_pass, three_passes, weight
from ds_kernels import AdamW, CpuBackend
from ds_kernels.optim import FusedAdagrad, FusedLamb, FusedLion, FusedSGD, StochasticRounding
from torch import Tensor, nn

NUM_TENSORS = 16  # of one model
DeepSpeed = dict[str, Callable[..., torch.optim.Optimizer]]


def deepspeeds() -> DeepSpeed:
    """Return DeepSpeed's optimizers for CPUs, compiled; none where it is not installed."""
    try:
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.lion import DeepSpeedCPULion
    except ImportError:
        return {}
    kinds = {"adam": DeepSpeedCPUAdam, "adagrad": DeepSpeedCPUAdagrad, "lion": DeepSpeedCPULion}
    for kind in kinds.values():
        kind([nn.Parameter(torch.zeros(1))])
    return kinds


# Tasks #


def bf16_model(numel: int, deepspeed: DeepSpeed) -> Iterator[Contender]:
    for moments, moved in (("fp32", 26.0), ("bf16", 18.0), ("int8", 14.25)):
        optimizer = AdamW([weight(numel, torch.bfloat16)], lr=LR, moments=moments, kernels=CpuBackend())
        yield Contender(f"split master, {moments} moments, {state_bytes(optimizer):.4g} B", moved, optimizer.step)
    rounded = AdamW(
        [weight(numel, torch.bfloat16)],
        lr=LR,
        moments="bf16",
        rounding=StochasticRounding(),
        kernels=CpuBackend(),
    )
    yield Contender(f"no master, bf16 moments, stochastic, {state_bytes(rounded):.4g} B", 14.0, rounded.step)
    yield one_pass(numel)._replace(name="float32 master and copy, one pass, 12 B")
    yield three_passes("cast, torch fused, copy, 12 B", numel, lambda w: torch.optim.AdamW([w], lr=LR, fused=True))
    fused = torch.optim.AdamW([weight(numel, torch.bfloat16)], lr=LR, fused=True)
    yield Contender("torch fused, no master, bf16 moments, 4 B", 14, fused.step)
    if "adam" in deepspeed:
        adam = deepspeed["adam"]
        yield three_passes("cast, DeepSpeedCPUAdam, copy, 12 B", numel, lambda w: adam([w], lr=LR))
        for fp32, moved in ((True, 22), (False, 14)):
            low = adam([weight(numel, torch.bfloat16)], lr=LR, fp32_optimizer_states=fp32)
            name = f"DeepSpeedCPUAdam, no master, {'fp32' if fp32 else 'bf16'} moments, {8 if fp32 else 4} B"
            yield Contender(name, moved, low.step)


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Return bytes of state per parameter, after making it."""
    optimizer.step()
    [(param, state)] = optimizer.state.items()
    return sum(tensor.nbytes for name, tensor in state.items() if name != "step") / param.numel()


def lamb(numel: int, deepspeed: DeepSpeed) -> Iterator[Contender]:
    yield Contender("FusedLamb", 40, FusedLamb(weights(numel), lr=LR, weight_decay=0.1, kernels=CpuBackend()).step)
    params, grads, m, v = arrays(numel, 2)

    def step() -> None:
        torch._foreach_lerp_(m, grads, 0.1)
        torch._foreach_mul_(v, 0.999)
        torch._foreach_addcmul_(v, grads, grads, 0.001)
        denom = torch._foreach_sqrt(v)
        torch._foreach_add_(denom, 1e-8)
        update = torch._foreach_div(m, denom)
        torch._foreach_add_(update, params, alpha=0.1)
        pairs = zip(torch._foreach_norm(params), torch._foreach_norm(update))
        torch._foreach_mul_(update, [-LR * float(weight / length) for weight, length in pairs])
        torch._foreach_add_(params, update)

    yield Contender("torch._foreach", 40, step)


def lion(numel: int, deepspeed: DeepSpeed) -> Iterator[Contender]:
    yield Contender("FusedLion", 20, FusedLion(weights(numel), lr=LR, weight_decay=0.1, kernels=CpuBackend()).step)
    params, grads, m = arrays(numel, 1)

    def step() -> None:
        update = torch._foreach_mul(m, 0.9)
        torch._foreach_add_(update, grads, alpha=0.1)
        torch._foreach_sign_(update)
        torch._foreach_mul_(params, 1 - LR * 0.1)
        torch._foreach_add_(params, update, alpha=-LR)
        torch._foreach_lerp_(m, grads, 0.01)

    yield Contender("torch._foreach", 20, step)
    if "lion" in deepspeed:
        yield Contender("DeepSpeedCPULion", 20, deepspeed["lion"](weights(numel), lr=LR, weight_decay=0.1).step)


def adagrad(numel: int, deepspeed: DeepSpeed) -> Iterator[Contender]:
    yield Contender("FusedAdagrad", 20, FusedAdagrad(weights(numel), lr=LR, kernels=CpuBackend()).step)
    params, grads, total = arrays(numel, 1)

    def step() -> None:
        torch._foreach_addcmul_(total, grads, grads, 1.0)
        denom = torch._foreach_sqrt(total)
        torch._foreach_add_(denom, 1e-10)
        torch._foreach_addcdiv_(params, grads, denom, -LR)

    yield Contender("torch._foreach", 20, step)
    yield Contender("torch fused", 20, torch.optim.Adagrad(weights(numel), lr=LR, fused=True).step)
    if "adagrad" in deepspeed:
        yield Contender("DeepSpeedCPUAdagrad", 20, deepspeed["adagrad"](weights(numel), lr=LR).step)


def sgd(numel: int, deepspeed: DeepSpeed) -> Iterator[Contender]:
    settings: dict[str, Any] = {"lr": LR, "momentum": 0.9, "weight_decay": 0.1}
    yield Contender("FusedSGD", 20, FusedSGD(weights(numel), **settings, kernels=CpuBackend()).step)
    yield Contender("torch foreach", 20, torch.optim.SGD(weights(numel), **settings, foreach=True).step)
    yield Contender("torch fused", 20, torch.optim.SGD(weights(numel), **settings, fused=True).step)


def weights(numel: int) -> list[nn.Parameter]:
    return [weight(numel // NUM_TENSORS) for _ in range(NUM_TENSORS)]


def arrays(numel: int, num_states: int) -> list[list[Tensor]]:
    """Return parameters, gradients and positive states."""
    sizes = [numel // NUM_TENSORS] * NUM_TENSORS
    states = [[torch.rand(n) for n in sizes] for _ in range(num_states)]
    return [[torch.randn(n) for n in sizes], [torch.randn(n).mul_(1e-2) for n in sizes], *states]


TASKS = {"bf16 model": bf16_model, "lamb": lamb, "lion": lion, "adagrad": adagrad, "sgd": sgd}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[25e6], help="elements")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--out", type=Path, help="write the report as Markdown")
    args = parser.parse_args()
    deepspeed = deepspeeds()
    rows = []
    for numel in map(int, args.sizes):
        for task in args.tasks:
            contenders = [*TASKS[task](numel, deepspeed), axpy(numel)]
            for threads in args.threads:
                rows += measure(task, contenders, numel, threads, args.rounds)
                print("\n".join(map(line, rows[-len(contenders) :])), flush=True)
    title, *rest = header(args.rounds)
    report = "\n".join([title.replace("One AdamW step", "Steps of optimizers"), *rest, *map(line, rows)])
    if args.out is not None:
        args.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
