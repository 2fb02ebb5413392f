"""What each rank holds at ZeRO stages 0 to 3: measured, beside the formula.

    ds run --nproc 2 examples/memory.py

Uses ds-zero alone, in a plain torch loop: this is all it takes to shard a model without the engine.
"""

from __future__ import annotations

import logging
import os

import ds_zero
import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from train_lm import CONTEXT, Gpt

# Bytes per parameter on each of N ranks: bfloat16 compute, gradient sums in float32, AdamW with float32 master.
FORMULAS = {
    0: ("2 P", "4 P", "12 P"),
    1: ("2 P", "2 P + 4 P/N", "12 P/N"),
    2: ("2 P", "4 P/N", "12 P/N"),
    3: ("2 P/N", "4 P/N", "12 P/N"),
}


def value(formula: str, num_params: int, num_ranks: int) -> float:
    """Evaluate a formula of the table."""
    total = 0.0
    for term in formula.split(" + "):
        factor, _, share = term.partition(" P")
        total += float(factor) * num_params / (num_ranks if share else 1)
    return total


def measure(stage: int) -> tuple[ds_zero.MemoryReport, int]:
    """Train two steps and return what this rank holds, and the number of parameters."""
    torch.manual_seed(0)
    model = Gpt(dim=256, layers=6, heads=4, dropout=0.0)
    sharded = ds_zero.shard(
        model,
        lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        config=ds_zero.ZeroConfig(stage=stage),
        precision=ds_zero.Precision(compute=torch.bfloat16),
    )
    tokens = torch.randint(256, (2, CONTEXT + 1))
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        sharded.step()
    return sharded.memory(), sum(param.numel() for param in model.parameters())


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if num_ranks == 1:
        raise SystemExit("on one rank there is nothing to partition: ds run --nproc 2 examples/memory.py")
    reports = {stage: measure(stage) for stage in FORMULAS}
    num_params = reports[0][1]
    table = Table(
        title=f"MB per rank: {num_params:,} parameters P, bfloat16, AdamW, N = {num_ranks} ranks",
        caption="in flight: the most that whole units and their gradients took besides",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("stage", "", "parameters", "gradients", "optimizer", "total", "ratio", "in flight"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage, (report, _) in reports.items():
        held = (report.param, report.grad, report.state)
        wanted = sum(value(formula, num_params, num_ranks) for formula in FORMULAS[stage])
        measured = [f"{part / 1e6:.2f}" for part in (*held, sum(held))]
        ends = (f"{sum(held) / wanted:.4f}", f"{report.transient / 1e6:.2f}")
        table.add_row(str(stage), "measured", *measured, *ends)
        table.add_row("", "formula", *FORMULAS[stage], f"{wanted / 1e6:.2f}", style="dim")
    if rank == 0:
        Console(width=80).print(table)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
