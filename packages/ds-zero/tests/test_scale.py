"""From 8 to 16,384 ranks and up to a trillion parameters: what one rank sends and holds is what the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ds_zero
import pytest
import torch
from ds_testkit.models import Transformer
from ds_testkit.scale import Measured, ShapeKernels, fake_ranks, measure
from ds_testkit.threads import on_threads
from ds_testkit.traffic import Call, CountedCollectives, Traffic
from ds_zero.collectives import DenseCollectives, _fold
from ds_zero.kernels import TorchKernels
from torch import Tensor, nn

pytestmark = pytest.mark.rung_a

SIZES = [8, 64, 1024, 16384]


def gpt(dim: int, layers: int) -> Callable[[], nn.Module]:
    return partial(Transformer, vocab=8 * dim, dim=dim, layers=layers, heads=8, context=512)


def loss(model: nn.Module) -> Tensor:
    result: Tensor = model(torch.zeros(1, 17, dtype=torch.long))
    return result


def check_traffic(run: Measured, stage: int, size: int, *, first: bool = False) -> None:
    """2 P for stages 0 to 2, 3 P for stage 3; (size - 1) / size of each, in elements, padding included.

    At stage 3 the two last units of the forward pass are still whole when the backward pass begins with them. In the
    first pass ranks also agree on the order of reductions, one number for each unit.
    """
    total = sum(run.flats)
    assert total == run.num_params + run.padding
    once = total // size * (size - 1)
    num_flats, traffic = len(run.flats), run.traffic
    rows = traffic.calls[Call("gather_rows", "world")]
    gathered = run.flats + (run.flats[:-2] if stage == 3 else [])
    gathers = sum(gathered) // size * (size - 1)
    assert traffic.calls == {
        ("reduce_scatter", "world"): num_flats,
        ("all_gather", "world"): len(gathered),
        ("gather_rows", "world"): rows,
        **({("broadcast", "world"): 1} if first else {}),
    }
    assert traffic.elements["broadcast", "world"] <= num_flats * first
    assert traffic.elements["reduce_scatter", "world"] == once
    assert traffic.elements["all_gather", "world"] == gathers
    # gradients and parameters travel in two bytes; stage 0 gathers gradient sums, in four
    assert traffic.nbytes["reduce_scatter", "world"] == 2 * once
    assert traffic.nbytes["all_gather", "world"] == (4 if stage == 0 else 2) * gathers
    assert traffic.elements["gather_rows", "world"] <= once / 64


def check_memory(run: Measured, stage: int, size: int) -> None:
    """The table of ``ds_zero.shard`` for bfloat16, exactly, with padding; Adam's moments and counters have none."""
    p, share, widest = sum(run.flats), sum(run.flats) // size, max(run.flats)
    memory = run.memory
    assert memory.param == 2 * (share if stage == 3 else p)
    assert memory.grad == {0: 4 * p, 1: 2 * p + 4 * share, 2: 4 * share, 3: 4 * share}[stage]
    assert memory.state == 4 * (share if stage else p) + sum(8 * numel + 4 for numel in run.segments)
    assert (share if stage else p) - run.padding <= sum(run.segments) <= (share if stage else p)
    leaves = 3 * 2 * widest if stage != 1 else 0
    units = 2 * 2 * widest if stage == 3 else 0
    assert memory.transient <= leaves + units
    assert memory.peak_units == (2 if stage == 3 else 0)
    assert run.receive_bytes <= 2 * 2 * widest


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sends_and_holds_what_the_formulas_say(stage: int, size: int) -> None:
    run = measure(gpt(dim=1024, layers=4), loss, stage, size, rank=size - 3)
    check_traffic(run, stage, size)
    check_memory(run, stage, size)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trillion_parameters_on_16384_ranks(stage: int) -> None:
    run = measure(gpt(dim=25600, layers=128), loss, stage, 16384, steps=1)
    assert 1.0e12 < run.num_params < 1.02e12
    assert run.padding <= 0.01 * run.num_params
    check_traffic(run, stage, 16384, first=True)
    check_memory(run, stage, 16384)
    # what the norm gathers at a time does not grow with the model, only with its widest unit
    assert run.largest_rows_bytes <= max(16 << 20, 8 * max(run.flats) // 2048)


@pytest.mark.parametrize("size", SIZES)
def test_padding_stays_below_one_percent(size: int) -> None:
    """... where units have 6,400 elements for each rank; below that, 64 elements for each rank and unit."""
    with fake_ranks(size) as group, torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(size * 6400, 1) for _ in range(2)])
        sharded = ds_zero.shard(model, None, group=group, parts=ds_zero.Parts(kernels=ShapeKernels()))
    for unit in sharded._units:
        for flat in unit.flats:
            assert flat.layout.padding <= 0.02 * size * 6400
            assert flat.layout.padding < flat.layout.granule * size + 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5, 32, 33, 64, 100, 1024])
def test_rows_are_folded_along_the_summation_tree(num_rows: int, dtype: torch.dtype) -> None:
    rows = torch.randn(num_rows, 7).to(dtype)
    whole, folded = torch.empty(7), torch.empty(7)
    TorchKernels().tree_sum(whole, list(rows.unbind()))
    TorchKernels().tree_sum(folded, list(_fold(rows.clone(), 4).unbind()))
    assert torch.equal(folded, whole)


def reduced_on_threads(size: int, rank: int) -> tuple[Tensor, Traffic]:
    group = torch.distributed.group.WORLD
    assert group is not None
    traffic = Traffic()
    comm = CountedCollectives(DenseCollectives(group, TorchKernels()), traffic, axis="node")
    full = torch.randn(size * 3, generator=torch.Generator().manual_seed(rank))
    out = torch.empty(3)
    comm.reduce_scatter(out, full, key=0).wait()
    return out, traffic


def test_sixty_four_ranks_sum_in_the_order_of_the_tree() -> None:
    results = on_threads(64, partial(reduced_on_threads, 64))
    fulls = [torch.randn(64 * 3, generator=torch.Generator().manual_seed(rank)) for rank in range(64)]
    want = torch.empty(64 * 3)
    TorchKernels().tree_sum(want, fulls)
    assert torch.equal(torch.cat([out for out, _ in results]), want)
    assert results[0][1].nbytes == {("reduce_scatter", "node"): 63 * 3 * 4}
