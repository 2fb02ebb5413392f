"""A training program in which one rank gets into trouble; started by test_diagnosis.py as several processes.

Arguments: what happens, the rank it happens to, and the settings of ``ZeroConfig`` as JSON. The trouble comes in the
third step, in block 1. A rank that survives prints the text of the RankError that ended it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time

import ds_zero
import torch
import torch.distributed as dist
from ds_zero.board import RankError
from torch import Tensor, nn

TROUBLED_STEP = 2


class Stumble(torch.autograd.Function):
    """Does something in the middle of the backward pass."""

    @staticmethod
    def forward(ctx, x, trouble):  # type: ignore[no-untyped-def]
        ctx.trouble = trouble
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.trouble()
        return grad, None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.trouble = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Stumble.apply(self.first(x), self.trouble))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if not (index == 1 and self.skips):
                x = block(x)
        return x.square().mean()


def be_killed() -> None:
    time.sleep(0.8)  # longer than the interval of notes: it is last seen here
    os.kill(os.getpid(), signal.SIGKILL)


def outlive_the_store() -> None:
    store = dist.distributed_c10d._get_default_store().clone()
    while True:
        try:
            store.check(["any"])
        except RuntimeError:
            return
        time.sleep(0.05)


def fail() -> None:
    raise ArithmeticError("the answer is not 42")


def main() -> None:
    what, troubled, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    settings.pop("last_words", None)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    afflicted = dist.get_rank() == troubled
    model = Model()
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=ds_zero.ZeroConfig(**settings))
    for step in range(4):
        if afflicted and step == TROUBLED_STEP:
            if what == "skip":
                model.skips = True
            elif what == "kill":
                model.blocks[1].trouble = be_killed
            elif what == "raise":
                model.blocks[1].trouble = fail
            elif what == "outlive":
                model.blocks[1].trouble = outlive_the_store
            elif what.startswith("sleep"):
                model.blocks[1].trouble = lambda: time.sleep(float(what.removeprefix("sleep")))
            elif what.startswith("hold"):
                ctypes.PyDLL(None).sleep(int(what.removeprefix("hold")))  # with the interpreter's lock
            elif what == "leave":
                return
        model(torch.ones(2, 8)).backward()
        sharded.step(1 / max(1.0, sharded.grad_norm().value))
    sys.stdout.write("trained\n")


if __name__ == "__main__":
    try:
        main()
    except RankError as error:
        sys.stdout.write(f"RankError: {error}\n")
        if (seconds := json.loads(sys.argv[3]).get("last_words", 0.0)) > 0:
            time.sleep(seconds)  # as one who saves what can be saved
            sys.stdout.write("last words\n")
        raise
