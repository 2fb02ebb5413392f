"""One rank at the end of a slow link: steps each optimizer, and prints what it and the kernel counted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from ds_comm.codecs import BlockCodec
from ds_comm.optim import CompressedAdam, LocalSteps, OneBitAdam, OneBitLamb, ZeroOneAdam
from ds_testkit.slow_link import Counters
from torch import nn

NUMEL, STEPS = 400_000, 4


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://")
    param = nn.Parameter(torch.zeros(NUMEL))
    half = BlockCodec(code="sign", scale_dtype=torch.float16)
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "warm-up": lambda: OneBitAdam([param]),
        "1-bit Adam": lambda: OneBitAdam([param], freeze_step=1),
        "1-bit Adam, sign": lambda: OneBitAdam([param], freeze_step=1, codec=half),
        "1-bit LAMB": lambda: OneBitLamb([param], freeze_step=1),
        "0/1 Adam": lambda: ZeroOneAdam([param], var_freeze_step=1),
        "int4": lambda: CompressedAdam([param]),
        "local steps": lambda: LocalSteps(torch.optim.SGD([param]), every=2),
    }
    counted = {}
    for name, make in makers.items():
        optimizer = make()
        for step in range(STEPS + 1):
            if step == 1:
                dist.barrier()
                counters, before = Counters(os.environ["GLOO_SOCKET_IFNAME"]), optimizer.traffic.sent
            param.grad = torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        dist.barrier()
        counted[name] = {"accounted": optimizer.traffic.sent - before, "kernel": counters.sent()}
    dist.destroy_process_group()
    sys.stdout.write(json.dumps(counted) + "\n")


if __name__ == "__main__":
    main()
