"""Bytes on each rank: equal to the formulas, constant from step to step, at most two units whole at once."""

from __future__ import annotations

import gc

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import Transformer
from torch import Tensor

from .helpers import Run, build, train_steps

pytestmark = pytest.mark.rung_c

MODEL = {"dim": 64, "layers": 4, "vocab": 64}


def expected(stage: int, num_params: int, num_ranks: int, low: bool) -> dict[str, float]:
    """The formulas of ``ds_zero.shard``'s docstring, by kind, in bytes.

    Paper's formulas (parameters and gradients in 2 bytes, 12 bytes of optimizer state), with gradient sums in
    float32; in float32 the parameters are the master themselves.
    """
    size, p, n = 2 if low else 4, num_params, num_ranks
    param = p * size / (n if stage == 3 else 1)
    if stage == 0:
        grad = 4.0 * p
    elif stage == 1:
        grad = p * size + (4 * p / n if low else 0)
    else:
        grad = 4 * p / n
    state = (12 if low else 8) * p / (n if stage else 1)
    return {"param": param, "grad": grad, "state": state}


def held(rank: Rank, run: Run) -> tuple[ds_zero.MemoryReport, int, int, int]:
    """Train, then return the report, the bytes of every live tensor storage, parameters and padding."""
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(2))
    flats = [flat for unit in sharded._units for flat in unit.flats]
    num_params = sum(slot.numel for flat in flats for slot in flat.layout.slots)
    padding = sum(flat.layout.padding for flat in flats)
    return sharded.memory(), _live_bytes(), num_params, padding


def _live_bytes() -> int:
    gc.collect()
    # shallow tensors only: looking deeper wakes lazy modules, and what torch deprecates warns when touched
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in gc.get_objects() if type(t) in _TENSORS}
    return sum(storage.nbytes() for storage in storages.values())


_TENSORS = (Tensor, torch.nn.Parameter)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_equals_the_formula(ranks: RankPool, stage: int, compute: torch.dtype | None, size: int) -> None:
    run = Run(stage=stage, compute=compute, num_micro_batches=size, model=MODEL)
    for report, _, num_params, padding in ranks.run(held, run, size=size):
        want = expected(stage, num_params, size, low=compute is not None)
        for kind, wanted in want.items():
            got = getattr(report, kind)
            assert abs(got - wanted) <= 0.01 * wanted + 16 * padding, (kind, got, wanted)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_report_is_what_the_process_holds(ranks: RankPool, stage: int) -> None:
    """The report is not only consistent with itself: live tensors of the process add up to it."""
    run = Run(stage=stage, compute=torch.bfloat16, num_micro_batches=2, model=MODEL)
    for report, live, _, _ in ranks.run(held, run, size=2):
        total = report.param + report.grad + report.state
        assert total <= live <= total * 1.02 + report.transient + _receive_bytes(run), (total, live, report)


def _receive_bytes(run: Run) -> int:
    """At most two receive buffers of the largest unit's leaf, in two bytes."""
    dim = int(run.model["dim"])
    return 2 * 2 * 13 * dim * dim


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_at_most_two_units_are_whole(ranks: RankPool, compute: torch.dtype | None) -> None:
    run = Run(stage=3, compute=compute, model=MODEL)
    for report, _, _, _ in ranks.run(held, run, size=2):
        assert report.peak_units == 2
        block_bytes = 13 * MODEL["dim"] ** 2 * (2 if compute else 4)  # 12 d^2 and what rounds up to 13
        assert report.transient <= 5 * block_bytes  # two units whole, three leaves


class PartlyUsed(torch.nn.Module):
    """Every block has a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(6)])
        for block in self.blocks:
            block.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.sum()


def peak_of_partly_used(rank: Rank) -> int:
    model = PartlyUsed()
    config = ds_zero.ZeroConfig(stage=3)
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=config, group=rank.group)
    for _ in range(3):
        model(torch.ones(2, 8)).backward()
        sharded.step()
    return sharded.memory().peak_units


def test_unused_parameters_keep_no_unit_whole(ranks: RankPool) -> None:
    assert ranks.run(peak_of_partly_used, size=2) == [2, 2]


def growth(rank: Rank, run: Run) -> list[int]:
    model, sharded = build(rank, run)
    sizes = []
    for step in range(run.steps):
        train_steps(rank, run, model, sharded, [step])
        if step in (4, run.steps - 1):
            sizes.append(_live_bytes())
    return sizes


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_growth_over_fifty_steps(ranks: RankPool, stage: int) -> None:
    run = Run(stage=stage, steps=50, num_micro_batches=4, compute=torch.bfloat16)
    for early, late in ranks.run(growth, run, size=2):
        assert late <= early


def test_gradient_sums_in_bfloat16_halve_their_memory(ranks: RankPool) -> None:
    reports = ranks.run(held_with_low_gradients, Run(stage=2, num_micro_batches=2, model=MODEL), size=2)
    for report, num_params, padding in reports:
        # the paper's stage 2: 2 P + 14 P / N
        assert report.param + report.grad + report.state <= num_params * (2 + 14 / 2) * 1.01 + 16 * padding


def held_with_low_gradients(rank: Rank, run: Run) -> tuple[ds_zero.MemoryReport, int, int]:
    from .helpers import make_optimizer, seeded

    model = seeded(**run.model)
    sharded = ds_zero.shard(
        model,
        make_optimizer("AdamW"),
        config=ds_zero.ZeroConfig(stage=run.stage),
        group=rank.group,
        precision=ds_zero.Precision(compute=torch.bfloat16, gradient=torch.bfloat16),
    )
    train_steps(rank, run, model, sharded, range(2))
    flats = [flat for unit in sharded._units for flat in unit.flats]
    num_params = sum(slot.numel for flat in flats for slot in flat.layout.slots)
    return sharded.memory(), num_params, sum(flat.layout.padding for flat in flats)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_dropped_model_is_freed(ranks: RankPool, stage: int) -> None:
    for before, after in ranks.run(dropped, Run(stage=stage, model=MODEL), size=2):
        assert after <= before


def dropped(rank: Rank, run: Run) -> tuple[int, int]:
    before = _live_bytes()
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(1))
    del model, sharded
    return before, _live_bytes()


def bytes_allocated(rank: Rank, stage: int | None) -> tuple[int, int]:
    """Return the bytes that one warm step allocates, with ds-zero or (None) without, and the number of parameters."""
    torch.manual_seed(0)
    model, batch = Transformer(256, 128, 4, heads=2, context=64), torch.arange(64).unsqueeze(0)
    sharded = None
    if stage is not None:
        config = ds_zero.ZeroConfig(stage=stage)
        make = lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True)  # noqa: E731
        sharded = ds_zero.shard(model, make, config=config, group=rank.group)

    def step() -> None:
        for _ in range(2):
            model(batch).backward()
        if sharded is None:
            model.zero_grad()
        else:
            sharded.step(min(1.0, 1.0 / sharded.grad_norm().value))

    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    allocated = sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)
    return allocated, sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_warm_step_allocates_what_the_model_does(ranks: RankPool, stage: int) -> None:
    """Beyond that only the norm's sums: 8 bytes for each 64 elements at most, and some more while they are added."""
    alone, _ = ranks.run(bytes_allocated, None, size=2)[0]
    for allocated, num_params in ranks.run(bytes_allocated, stage, size=2):
        assert allocated - alone <= 4 * 8 * num_params / 64
