"""GPU checks: ``python tests-integration/gpu/run.py [--out FILE.json]`` from the plain tree, no installation needed.

Runs on torch alone (>= 2.11). Ranks are threads that share one GPU, so that sharding runs where there is a single card.
Without a GPU every check is listed as not run, and the exit code is 0; ``--device cpu`` runs them on the CPU, which
tests the checks, not the GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
for folder in (*(ROOT / "packages").glob("*/src"), ROOT / "tests-integration" / "testkit" / "src"):
    sys.path.insert(0, str(folder))

import torch  # the tree has to be on the path first
from ds_testkit.state import Exported, State, assembled, assert_same_bits, exported
from ds_testkit.threads import on_threads
from torch import Tensor, nn

import ds_zero
from ds_zero.optim import Lamb, Lars, Muon
import dropout_checks
import kernel_checks
import kernel_speed
from outcome import NotRun
import step_checks

STEPS, MICRO_BATCHES = 8, 4


def network(device: torch.device) -> nn.Module:
    """Return a small network with blocks."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)]
    return nn.Sequential(nn.Sequential(*blocks), nn.Linear(64, 8)).to(device)


def batch(index: int, device: torch.device, compute: torch.dtype | None) -> Tensor:
    """Return micro-batch ``index``."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(index)).to(device)
    return x if compute is None else x.to(compute)


def adamw(groups: Any) -> torch.optim.Optimizer:
    """Return an elementwise optimizer."""
    return torch.optim.AdamW(groups, lr=1e-2)


def train(
    device: torch.device,
    stage: int,
    compute: torch.dtype | None,
    num_ranks: int,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
) -> State:
    """Train sharded over ``num_ranks`` threads; return the whole state."""
    networks = [network(device) for _ in range(num_ranks)]  # threads share torch's generator

    def on_rank(rank: int) -> list[Exported]:
        sharded = ds_zero.shard(
            networks[rank],
            make_optimizer,
            config=ds_zero.ZeroConfig(stage=stage),
            precision=ds_zero.Precision(compute=compute),
        )
        for step in range(STEPS):
            for index in range(rank, MICRO_BATCHES, num_ranks):
                x = batch(step * MICRO_BATCHES + index, device, compute)
                networks[rank](x).float().square().mean().backward()
            sharded.step(min(1.0, 0.1 / sharded.grad_norm().value))
        return exported(sharded)

    return assembled(on_threads(num_ranks, on_rank))


def ranks_and_stages_give_the_same_bits(device: torch.device) -> None:
    """The promise of docs/bits.md, on one card."""
    for compute in (None, torch.bfloat16, torch.float16):
        want = train(device, 0, compute, 1)
        for num_ranks in (1, 2, 4):
            for stage in (0, 1, 2, 3):
                assert_same_bits(train(device, stage, compute, num_ranks), want)


def optimizers_of_each_kind_give_the_same_bits(device: torch.device) -> None:
    """Sums over tensors, and whole tensors: on 1, 2 and 4 ranks."""
    for make in (Lamb, Lars, Muon, torch.optim.Adafactor):
        want = train(device, 0, torch.bfloat16, 1, make)
        for stage, size in ((0, 2), (1, 4), (3, 2)):
            assert_same_bits(train(device, stage, torch.bfloat16, size, make), want)


def equals_a_plain_loop(device: torch.device) -> None:
    """Sharded float32 stays as near to plain torch as rounding lets it."""
    got = train(device, 3, None, 2)
    net = network(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(STEPS):
        indices = range(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES)
        torch.stack([net(batch(index, device, None)).square().mean() for index in indices]).mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for name, param in net.named_parameters():
        torch.testing.assert_close(got["param", name], param.detach().reshape(-1), rtol=1e-3, atol=1e-4)


def reference_kernels_serve_the_device(device: torch.device) -> None:
    """The plain torch backend works on any device."""
    import ds_kernels

    results = []
    with ds_kernels.use_backend("reference"):
        for kind in (ds_kernels.AdamW, torch.optim.AdamW):
            param = nn.Parameter(torch.ones(1000, device=device))
            optimizer = kind([param], lr=1e-2, weight_decay=0.1)
            for seed in range(5):
                param.grad = torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(device)
                optimizer.step()
            results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def recomputed_blocks_change_no_bit(device: torch.device) -> None:
    """Saved inputs come back as they were from pinned host memory and from contiguous buffers."""
    import ds_core

    results = []
    options: list[dict[str, bool]] = [
        {"cpu_checkpointing": host, "contiguous_memory_optimization": rows, "synchronize_checkpoint_boundary": host}
        for host in (False, True)
        for rows in (False, True)
    ]
    for option in [None, *options]:
        net = network(device)
        sharded = ds_zero.shard(net, lambda groups: torch.optim.SGD(groups, lr=0.1))
        run = ds_core.Checkpointer(ds_core.ActivationCheckpointing(**(option or {})))
        if option is not None:
            sharded.wrap_blocks(run)
        for step in range(STEPS):
            net(batch(step, device, None)).square().mean().backward()
            sharded.step()
        results.append(assembled([exported(sharded)]))
        assert run.saved.now == 0
        elsewhere = option is not None and (
            option["contiguous_memory_optimization"] or (option["cpu_checkpointing"] and device.type == "cuda")
        )
        assert bool(run.saved.peak) == elsewhere
    for result in results[1:]:
        assert_same_bits(result, results[0])


def compiled_blocks_agree(device: torch.device) -> None:
    """The bits of aot_eager are those of torch."""
    results = []
    for backend in (None, "aot_eager"):
        net = network(device)
        sharded = ds_zero.shard(net, lambda groups: torch.optim.SGD(groups, lr=0.1))
        if backend is not None:
            sharded.compile(backend=backend, fullgraph=True)
        for step in range(STEPS):
            net(batch(step, device, None)).square().mean().backward()
            sharded.step()
        results.append(assembled([exported(sharded)]))
    assert_same_bits(results[1], results[0])


def deferred_models_have_the_bits_of_eager_ones(device: torch.device) -> None:
    """Also where values are drawn on the GPU, whose generator counts in another way."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        with device:
            net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
            net.extra = nn.Parameter(torch.randn(1000) * 2)
        nn.init.trunc_normal_(net[0].weight, std=0.02)
        net[1].to("cpu").to(device)
        return net

    eager = build()
    drawn = torch.randn(3, device=device)
    with ds_zero.deferred():
        model = build()
    assert torch.equal(torch.randn(3, device=device), drawn)
    ds_zero.shard(model, None)
    for got, want in zip(model.parameters(), eager.parameters(), strict=True):
        assert got.device.type == device.type
        assert torch.equal(got, want)


def error_of(action: Callable[[], object]) -> str:
    """Return the text with which ``action`` is refused; empty if it is not."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""


def states_leave_the_device_and_come_back(device: torch.device) -> None:
    """Parking gives memory back, refuses forward passes meanwhile, and changes no bit."""

    def run(*, parked: bool) -> State:
        net = network(device)
        precision = ds_zero.Precision(compute=torch.bfloat16)
        sharded = ds_zero.shard(net, lambda groups: torch.optim.AdamW(groups, lr=1e-2), precision=precision)
        for step in range(4):
            net(batch(step, device, torch.bfloat16)).float().square().mean().backward()
            sharded.step()
            if parked and step == 1:
                report = sharded.memory()
                freed = sharded.parking.offload_states()
                if device.type == "cuda":
                    assert sum(freed.values()) >= report.param + report.grad + report.state, (freed, report)
                    assert "reload_states" in error_of(lambda: net(batch(0, device, torch.bfloat16)))
                assert sharded.parking.reload_states() == sum(freed.values())
        return assembled([exported(sharded)])

    assert_same_bits(run(parked=True), run(parked=False))


CHECKS: list[Callable[[torch.device], Any]] = [
    deferred_models_have_the_bits_of_eager_ones,
    states_leave_the_device_and_come_back,
    ranks_and_stages_give_the_same_bits,
    equals_a_plain_loop,
    optimizers_of_each_kind_give_the_same_bits,
    reference_kernels_serve_the_device,
    recomputed_blocks_change_no_bit,
    compiled_blocks_agree,
    *kernel_checks.CHECKS,
    *step_checks.CHECKS,
    *dropout_checks.CHECKS,
    *kernel_speed.CHECKS,
]


def run(check: Callable[[torch.device], Any], device: torch.device, *, present: bool) -> dict[str, Any]:
    """Run one check, print its line and figures, and return its row."""
    start, status, figures = time.perf_counter(), "passed", None
    try:
        if not present:
            raise NotRun("no GPU")
        figures = check(device)
    except NotRun as reason:
        status = f"not run: {reason}"
    except Exception:  # every check is run, and each failure is shown
        traceback.print_exc()
        status = "FAILED"
    row = {"check": check.__name__, "status": status, "seconds": round(time.perf_counter() - start, 2)}
    print(f"{status[:40]:16} {row['seconds']:7.2f} s  {check.__name__}", flush=True)
    for name, figure in (figures or {}).items():
        print(f"    {name:28} {figure}")
    if device.type == "cuda" and present:
        torch.cuda.empty_cache()
    return row if figures is None else row | {"figures": figures}


def main() -> int:
    """Run all checks; return the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to test the checks themselves")
    parser.add_argument("--only", default="", help="run the checks whose name holds this")
    options = parser.parse_args()
    device = torch.device(options.device)
    present = device.type != "cuda" or torch.cuda.is_available()
    name = torch.cuda.get_device_name() if device.type == "cuda" and present else options.device
    rows = [run(check, device, present=present) for check in CHECKS if options.only in check.__name__]
    result = {"date": datetime.date.today().isoformat(), "device": name, "torch": torch.__version__, "checks": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return sum(row["status"] == "FAILED" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
