"""What layers cost, and which schedule suits: measured, compared, shown."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from ds_pipe import Costs, PipelineModule, Schedule, make_schedule, measure, peak_bytes, simulate
from ds_pipe.commands import main
from ds_pipe.instruction import Op
from ds_pipe.layers import LayerSpec, TiedLayerSpec
from ds_pipe.measure import measure_costs, staged
from ds_pipe.plan import compare
from ds_pipe.planned import read_plan
from ds_pipe.report import table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional


class Clock:
    """Stands still but for what layers say they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, advance: Callable[[], None]) -> Tensor:
        ctx.advance = advance
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.advance()
        return grads[0], None


class Timed(nn.Module):
    def __init__(self, clock: Clock, forward: float, input_grad: float, weight_grad: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.linear.weight.register_post_accumulate_grad_hook(lambda _: clock.advance(weight_grad))
        self.clock, self.seconds, self.input_grad = clock, forward, input_grad

    def forward(self, given: Tensor) -> Tensor:
        self.clock.advance(self.seconds)
        return Passing.apply(self.linear(given), lambda: self.clock.advance(self.input_grad))


def test_halves_of_a_backward_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)

    def loss(out: Tensor, target: float) -> Tensor:
        clock.advance(target)
        return out.sum()

    model = PipelineModule(
        [LayerSpec(Timed, clock, 1.0, 2.0, 4.0), LayerSpec(Timed, clock, 8.0, 16.0, 32.0)], loss_fn=loss
    )
    costs = measure_costs(model, torch.ones(3, 4, requires_grad=True), 64.0, repeats=3)
    assert costs.forward == (1.0, 72.0)
    assert costs.input_grad == (2.0, 16.0)
    assert costs.weight_grad == (4.0, 32.0)
    assert costs.backward == (6.0, 48.0)
    assert costs.held_bytes == (256.0, 256.0)
    assert costs.message_bytes == (48.0, 48.0)
    with pytest.raises(ValueError, match="repeats has to be at least 1; got 0"):
        measure_costs(model, torch.ones(3, 4), 1.0, repeats=0)


def test_kept_bytes_count_a_storage_once() -> None:
    model = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(-1), nn.Linear(2, 2, bias=False)]
    costs = measure_costs(PipelineModule(model), torch.ones(3, 4), repeats=1)
    # input; output of relu, which is the next linear's input; nothing; output of softmax; nothing
    assert costs.kept_bytes == (48.0, 96.0, 0.0, 24.0, 0.0)
    assert costs.message_bytes == (48.0, 96.0, 96.0, 24.0, 24.0)
    assert all(p.grad is None for layer in model for p in layer.parameters())


def head(embedding: nn.Embedding, hidden: Tensor) -> Tensor:
    return hidden @ embedding.weight.t()


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(out.flatten(0, 1), target.flatten())


MODEL = PipelineModule(
    [
        TiedLayerSpec("embed", nn.Embedding, 11, 8),
        *[LayerSpec(nn.Linear, 8, 8) for _ in range(6)],
        TiedLayerSpec("embed", nn.Embedding, 11, 8, forward_fn=head),
    ],
    loss_fn=loss_of,
    activation_checkpoint_interval=2,
)


NUMBERS, NETWORK = [1], torch.nn.Linear(2, 2)


def nothing_given() -> int:
    return 0


def sample(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, 5, dtype=torch.long), torch.zeros(batch, 5, dtype=torch.long)


def test_tied_and_recomputed_layers_are_measured() -> None:
    costs = measure_costs(MODEL, *sample(), repeats=1)
    assert costs.num_stages == 8
    assert costs.message_bytes == (120.0, *7 * (480.0,))
    assert costs.kept_bytes[1:7] == 6 * (480.0,)  # the input of each
    assert min(costs.forward + costs.input_grad) > 0
    shared = nn.Linear(4, 4)
    costs = measure_costs(PipelineModule.from_sequential(nn.Sequential(shared, nn.ReLU(), shared)), torch.ones(1, 4))
    assert costs.kept_bytes == (16.0, 16.0, 0.0)
    assert shared.weight.grad is None


@given(st.lists(st.integers(1, 50), min_size=6, max_size=12), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_costs_of_stages_are_sums(numbers: list[int], cuts: list[int]) -> None:
    each = tuple(map(float, numbers))
    bounds = [0, *sorted({cut for cut in cuts if cut < len(each)}), len(each)]
    layers = Costs(
        forward=each, input_grad=each[::-1], weight_grad=each, kept_bytes=each, message_bytes=each, latency=0.5
    )
    found = staged(layers, bounds)
    assert sum(found.forward) == sum(found.input_grad) == sum(each)
    assert found.kept_bytes[-1] == sum(each[bounds[-2] :])
    assert found.message_bytes == tuple(each[first] for first in bounds[:-1])
    assert found.latency == 0.5


def test_every_schedule_is_compared() -> None:
    layers = Costs(
        forward=(1, 1, 3, 1, 1, 1, 1, 3), input_grad=8 * (1,), weight_grad=8 * (1,), kept_bytes=8 * (10,),
        message_bytes=8 * (1,), latency=0.1,
    )  # fmt: skip
    found = compare(layers, num_ranks=2, num_micro_batches=4)
    names = [plan.name for plan in found.plans]
    assert not found.impossible
    assert sorted(names) == [
        *("1f1b", "gpipe", "greedy", "greedy (2 stages a rank)", "greedy (4 stages a rank)", "greedy (V)"),
        *(
            "interleaved",
            "interleaved (4 stages a rank)",
            "looped_bfs",
            "looped_bfs (4 stages a rank)",
            "zb_h1",
            "zb_v",
        ),
    ]
    seconds = [plan.timeline.seconds for plan in found.plans]
    assert seconds == sorted(seconds)
    (plan,) = (plan for plan in found.plans if plan.name == "1f1b")
    assert plan.bounds == [0, 4, 8]
    schedule = make_schedule("1f1b", num_ranks=2, num_micro_batches=4, costs=staged(layers, [0, 4, 8]))
    assert plan.schedule == schedule
    assert plan.timeline.seconds == simulate(schedule, staged(layers, [0, 4, 8])).seconds
    assert plan.peak_bytes == peak_bytes(schedule, staged(layers, [0, 4, 8]))
    assert plan.num_messages == 8


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10**6), tight=st.floats(0.6, 1.5))
def test_with_a_limit_no_fixed_one_is_faster_than_the_best_greedy_one(seed: int, tight: float) -> None:
    chance = random.Random(seed)
    numbers = [tuple(chance.uniform(0.3, 2.0) for _ in range(8)) for _ in range(7)]
    names = ("forward", "input_grad", "weight_grad", "backward", "kept_bytes", "message_bytes", "held_bytes")
    costs = Costs(
        **dict(zip(names, numbers, strict=True)),
        latency=chance.choice((0.0, 0.5)),
        bytes_per_second=chance.choice((0.5, 2.0, float("inf"))),
    )
    halves = staged(costs, [0, 4, 8])
    usual = peak_bytes(make_schedule("1f1b", num_ranks=2, num_micro_batches=4, costs=halves), halves)
    memory = tight * max(sum(each) for each in zip(usual, halves.held_bytes, strict=True))
    found = compare(costs, num_ranks=2, num_micro_batches=4, memory=memory)
    fixed = [plan.timeline.seconds for plan in found.plans if plan.fits and not plan.name.startswith("greedy")]
    greedy = [plan for plan in found.plans if plan.fits and plan.name.startswith("greedy")]
    for plan in greedy:
        stages = staged(costs, plan.bounds)
        for rank, peak in enumerate(peak_bytes(plan.schedule, stages)):
            held = sum(stages.held_bytes[stage] for stage in plan.schedule.stages_of(rank))
            assert held + peak <= memory * (1 + 1e-9)
    if fixed:
        assert min(plan.timeline.seconds for plan in greedy) <= min(fixed) * (1 + 1e-9)


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_without_a_limit_no_fixed_one_is_faster_than_the_greedy_one_for_its_stages(seed: int) -> None:
    chance = random.Random(seed)
    numbers = [tuple(chance.uniform(0.3, 2.0) for _ in range(8)) for _ in range(7)]
    names = ("forward", "input_grad", "weight_grad", "backward", "kept_bytes", "message_bytes", "held_bytes")
    costs = Costs(**dict(zip(names, numbers, strict=True)), bytes_per_second=chance.choice((0.5, 2.0, float("inf"))))
    found = compare(costs, num_ranks=2, num_micro_batches=4)
    fixed = [plan for plan in found.plans if not plan.name.startswith("greedy")]
    greedy = {plan.schedule.placement: plan for plan in found.plans if plan.name.startswith("greedy")}
    assert {plan.schedule.placement for plan in fixed} == greedy.keys()
    for plan in fixed:
        assert greedy[plan.schedule.placement].timeline.seconds <= plan.timeline.seconds
    for placement, plan in greedy.items():
        stages = staged(costs, plan.bounds)
        kept = [_kept(one.schedule, stages) for one in [plan, *fixed] if one.schedule.placement == placement]
        assert all(mine <= max(others) + 1e-9 for mine, *others in zip(*kept, strict=True))


def _kept(schedule: Schedule, costs: Costs) -> list[float]:
    """Return, by rank, the most bytes of activations that are kept at a time."""
    found = []
    for row in schedule.rows:
        sizes = {Op.F: 1.0, Op.B: -1.0, Op.W: -1.0}
        found.append(max(accumulate(sizes.get(one.op, 0.0) * costs.kept_bytes[max(one.stage, 0)] for one in row)))
    return found


def test_weights_count_for_the_memory() -> None:
    layers = replace(Costs.uniform(4), held_bytes=(10.0, 1.0, 1.0, 1.0))
    found = compare(layers, num_ranks=2, num_micro_batches=4, memory=12.0)
    assert [plan.name for plan in found.plans if plan.fits] == []  # rank 0 holds 11, and keeps 2 of a micro-batch
    assert "rank 0 needs 2 bytes" in found.impossible["greedy"]
    (plan,) = (plan for plan in found.plans if plan.name == "1f1b")
    assert plan.peak_bytes == [11.0 + 4.0, 2.0 + 2.0]
    less = compare(layers, num_ranks=2, num_micro_batches=4, memory=5.0)
    assert less.impossible["greedy"] == "weights alone take 11 bytes of rank 0, which has 5"
    assert {plan.fits for plan in compare(layers, num_ranks=2, num_micro_batches=4, memory=20.0).plans} == {True}


def test_what_does_not_fit_comes_last_and_what_cannot_be_says_why() -> None:
    layers = Costs.uniform(4)
    found = compare(layers, num_ranks=2, num_micro_batches=5, memory=6.0)
    fits = [plan.fits for plan in found.plans]
    assert fits == sorted(fits, reverse=True)
    assert not fits[-1]
    assert all(max(plan.peak_bytes) <= 6.0 for plan in found.plans if plan.fits)
    assert "gpipe" in [plan.name for plan in found.plans if not plan.fits]
    assert found.impossible["looped_bfs (4 stages a rank)"] == "it has 8 stages, and there are 4 layers"
    assert "interleaved needs a multiple of the 2 ranks" in found.impossible["interleaved"]
    assert "does not fit" in table(found)
    assert "interleaved: no: interleaved needs" in table(found)
    with pytest.raises(ValueError, match="gpipe: it has 3 stages, and there are 2 layers"):
        compare(Costs.uniform(2), num_ranks=3, num_micro_batches=5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, with a module that describes a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "described", sys.modules[__name__])
    return tmp_path


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--stages", "2", "--micro-batches", "4", "--bandwidth", "1e9", "--latency", "1e-6"]
    main(["plan", "described:MODEL", *sizes, "--batch", "2", "--repeats", "1", "--schedule", "zb_v", "--out", "it"])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split() == ["schedule", "step", "bubble", "peak", "of", "a", "rank", "messages"]
    assert len(lines[: lines.index("")]) == 1 + 12
    assert "stage 3 on rank 0: layers " in printed
    assert "0 (Embedding) again" in printed

    html = (folder / "it.html").read_text()
    picture = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    boxes = [element for element in picture if element.tag.endswith("rect")][1:]
    assert 2 * 4 * 4 <= len(boxes) <= 3 * 4 * 4  # F and I of 4 micro-batches at 4 stages, and W
    assert "described:MODEL: 2 ranks, 4 micro-batches" in html
    assert "http" not in html.replace('xmlns="http://www.w3.org/2000/svg"', "")
    planned = read_plan(folder / "it.plan.json")
    assert (planned.schedule.num_ranks, planned.bounds[-1]) == (2, 8)
    events = json.loads((folder / "it.trace.json").read_text())["traceEvents"]
    assert {"F0.0", "I3.3", "W3.3", "OPT"} <= {event["name"] for event in events}

    main(["plan", "it.costs.json", *sizes, "--schedule", "zb_v"])
    assert capsys.readouterr().out == printed.partition("wrote")[0]


def test_nothing_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {name: [1.0] * 4 for name in ("forward", "input_grad", "weight_grad", "kept_bytes", "message_bytes")}
    (folder / "few.json").write_text(json.dumps({**few, "held_bytes": [10.0, 1.0, 1.0, 1.0]}))
    sizes = ["--stages", "2", "--micro-batches", "4"]
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "few.json", *sizes, "--memory", "5", "--out", "it"])
    printed = capsys.readouterr()
    assert (
        "nothing fits into --memory 5; of these schedules zb_v takes least: 17 bytes on its fullest rank" in printed.err
    )
    assert "greedy: no: weights alone take 11 bytes of rank 0, which has 5" in printed.out
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "few.json", *sizes, "--memory", "17", "--schedule", "gpipe", "--out", "it"])
    assert "gpipe does not fit into --memory 17: a rank takes 20; zb_v, greedy (V)" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["few.json"]
    main(["plan", "few.json", *sizes, "--memory", "17", "--out", "it"])
    assert "does not fit" in capsys.readouterr().out
    assert Path("it.plan.json").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["described"], "MODEL is module:attribute or a file that ends in .json; got 'described'"),
        (["described:NOTHING"], "described has no NOTHING"),
        (["described:MODEL", "--sample", "none"], "described has no none"),
        (["described:sample"], "has to be a PipelineModule, or a function that returns one; got <class 'tuple'>"),
        (["described:staged"], "described:staged is called with no argument: missing a required argument: 'costs'"),
        (["described:NUMBERS"], "has to be a PipelineModule, or a function that returns one; got <class 'list'>"),
        (["described:NETWORK"], "or a function that returns one; got <class 'torch.nn.modules.linear.Linear'>"),
        (["described:MODEL", "--sample", "staged"], "staged is called with no argument: missing a required argument"),
        (
            ["described:MODEL", "--sample", "nothing_given", "--batch", "2"],
            "size given with --batch, 2: too many positional",
        ),
        (["no.json"], "no.json has to hold an object with lists of numbers, forward, input_grad"),
        (["list.json"], "list.json has to hold an object"),
        (["few.json"], "few.json has to hold an object with lists of numbers"),
        (["described:MODEL", "--schedule", "best"], "there is no schedule 'best' to draw; there are "),
        (["described:MODEL", "--stages", "9"], "it has 9 stages, and there are 8 layers"),
        (["described:MODEL", "--stages", "0"], "argument --stages: a whole number from 1 on is needed; got '0'"),
        (["described:MODEL", "--memory", "-1"], "argument --memory: a number above 0 is needed; got '-1'"),
        (["described:MODEL", "--latency", "-1"], "a number of seconds, 0 or more, is needed; got '-1'"),
        (["described:MODEL", "--memory", "4GB"], "argument --memory: a number above 0 is needed; got '4GB'"),
        (["nowhere.at_all:MODEL"], "the module 'nowhere.at_all' cannot be imported: No module named 'nowhere'"),
        (["described:MODEL", "--out", "."], "--out is what names of files begin with, and . is a folder: say best"),
        (["described:MODEL", "--out", "no/where"], "--out no/where: there is no folder no; make it first"),
    ],
)
def test_arguments_that_are_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    (folder / "list.json").write_text("[1, 2]")
    (folder / "few.json").write_text('{"forward": [1]}')
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--stages", "2", "--micro-batches", "4", "--repeats", "1", *arguments])
    assert text in capsys.readouterr().err
