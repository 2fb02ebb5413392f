"""What running a schedule costs beside the computations."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ds_pipe import Pipeline, make_schedule, messages
from ds_pipe.instruction import Value
from ds_pipe.messages import Messages
from ds_pipe.stage import Kept, Stage

MICRO_BATCHES = 64
LIMIT = 50e-6  # seconds of the processor for each instruction


def cost_of(call: Callable[[], Any]) -> float:
    """Return the processor time of the quickest of many calls: others on the machine do not count."""
    found = []
    for _ in range(30):
        start = time.thread_time()
        call()
        found.append(time.thread_time() - start)
    return min(found)


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_an_instruction_costs_little(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept([], [], None, {}, {})
    monkeypatch.setattr(Stage, "forward", lambda *_args, **_kwargs: (torch.empty(()), {}, kept))
    monkeypatch.setattr(Stage, "backward", lambda *_args: ([], {}))
    schedule = make_schedule(name, num_ranks=1, num_micro_batches=MICRO_BATCHES)
    stages = {stage: torch.nn.Identity() for stage in schedule.stages_of(0)}
    pipeline = Pipeline(schedule, stages, None, loss=lambda out, _target: out)
    batches = [0] * MICRO_BATCHES
    assert cost_of(lambda: pipeline.run(batches, batches)) / len(schedule.rows[0]) < LIMIT


class Wire:
    """Stands for ``torch.distributed``: carries messages within the process."""

    Work = messages.dist.Work

    def __init__(self) -> None:
        self.under_way: dict[int, torch.Tensor] = {}

    def get_rank(self, _group: object) -> int:
        return 0

    def isend(self, buffer: torch.Tensor, *, group: object, group_dst: int, tag: int) -> None:
        self.under_way[tag] = buffer

    def irecv(self, buffer: torch.Tensor, *, group: object, group_src: int, tag: int) -> None:
        buffer.copy_(self.under_way.pop(tag))


def test_a_message_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "dist", Wire())
    sender, receiver = (Messages(None, MICRO_BATCHES, None) for _ in range(2))  # type: ignore[arg-type]  # on the wire
    sent = [torch.randn(4, 4) for _ in range(MICRO_BATCHES)]
    found: list[torch.Tensor] = []

    def step() -> None:
        found.clear()
        for index, value in enumerate(sent):
            sender.send(Value("x", 1, index), value, 0)
            found.append(receiver.receive(Value("x", 1, index), 0).value())
        sender.finish()
        receiver.finish()

    step()
    assert cost_of(step) / (2 * MICRO_BATCHES) < LIMIT
    assert all(torch.equal(a, b) for a, b in zip(sent, found, strict=True))
