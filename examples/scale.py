"""What a model takes on any number of ranks, without any of them: nothing is allocated, nothing is sent.

    pip install ./tests-integration/testkit
    python examples/scale.py --dim 25600 --layers 128 --ranks 64 1024 16384

Runs the real partitioner on one of so many fake ranks, with a model that has shapes and no memory, for one optimizer
step. Replace ``make_model`` and ``make_loss`` by your own.
"""

from __future__ import annotations

import argparse

import torch
from ds_testkit.models import Transformer
from ds_testkit.scale import Measured, measure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


def readable(nbytes: float) -> str:
    """Three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 999.5 or unit == "TB":
            break
        nbytes /= 1e3
    return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:,.0f} {unit}"


def make_loss(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.zeros(1, 17, dtype=torch.long))
    return loss


def row(stage: int, size: int, run: Measured) -> list[str]:
    memory, traffic = run.memory, run.traffic
    sent = {op: nbytes for (op, _), nbytes in traffic.nbytes.items()}
    held = (memory.param, memory.grad, memory.state)
    bytes_of = (*held, sum(held), memory.transient + run.receive_bytes, sent["reduce_scatter"], sent["all_gather"])
    calls = sum(traffic.calls.values())
    return [f"{size:,}", str(stage), *map(readable, bytes_of), str(calls)]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a model takes on any number of ranks.")
    parser.add_argument("--dim", type=int, default=2048, help="width of the model")
    parser.add_argument("--layers", type=int, default=24, help="number of its blocks")
    parser.add_argument("--vocab", type=int, default=51200, help="number of tokens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024], help="numbers of ranks")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages")
    args = parser.parse_args()

    def make_model() -> nn.Module:
        return Transformer(args.vocab, args.dim, args.layers, heads=8, context=2048)

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = ("ranks", "stage", "param", "grad", "state", "held", "in flight", "reduce", "gather", "calls")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    paddings: dict[int, float] = {}
    num_params = 0
    for size in args.ranks:
        for stage in args.stages:
            run = measure(make_model, make_loss, stage, size)
            table.add_row(*row(stage, size, run))
            paddings[size], num_params = run.padding / run.num_params, run.num_params
        table.add_section()
    padded = ", ".join(f"{share:.3%} on {size:,}" for size, share in paddings.items())
    table.title = f"On each rank: {num_params:,} parameters, bfloat16, AdamW"
    table.caption = f"reduce, gather: sent in one step of one micro-batch\npadding: {padded} ranks"
    Console(width=96).print(table)


if __name__ == "__main__":
    main()
