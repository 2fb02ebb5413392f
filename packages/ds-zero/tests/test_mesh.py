"""Nodes of several ranks: hybrid placements have the bits of one rank, and the memory that their triples say."""

from __future__ import annotations

from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import seeded
from ds_testkit.state import assembled, assert_same_bits, exported
from ds_zero.collectives import LocalCollectives
from ds_zero.kernels import TorchKernels
from ds_zero.layout import Spec, plan
from ds_zero.mesh import Mesh, TwoLevelCollectives
from ds_zero.placement import Placement
from torch import Tensor, nn

from .helpers import Run, assemble_run, build, train_steps
from .test_state import Memory

pytestmark = pytest.mark.rung_c

MICS, HPZ = {"mics_shard_size": 2}, {"zero_hpz_partition_size": 2}
HYBRIDS = [(1, MICS), (2, MICS), (3, MICS), (3, HPZ)]
IDS = ["mics-1", "mics-2", "mics-3", "hpz-3"]
MODEL = {"dim": 64, "layers": 4, "vocab": 64}


@pytest.mark.parametrize("host_memory", [True, False], ids=["host memory", "messages"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "hybrid"), HYBRIDS, ids=IDS)
def test_bits_are_those_of_one_rank(
    ranks: RankPool, stage: int, hybrid: dict[str, int], compute: torch.dtype | None, host_memory: bool
) -> None:
    run = Run(stage=stage, num_micro_batches=8, compute=compute, steps=4)
    nodes = run._replace(settings={**hybrid, "host_memory": host_memory})
    assert_same_bits(assemble_run(ranks, nodes, size=4), assemble_run(ranks, run, size=1))


def leg(rank: Rank, run: Run, source: Memory | None, steps: range) -> tuple[list[Any], Any, Any]:
    """Go on from ``source``, if any, for ``steps``."""
    model, sharded = build(rank, run)
    if source is not None:
        sharded.load_state(source)
    train_steps(rank, run, model, sharded, steps)
    state = sharded.state()
    return exported(sharded), state.scalars, state.shapes


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_resized_from_4_to_2_to_1_to_4(ranks: RankPool, compute: torch.dtype | None) -> None:
    """Through four arrangements in one run: hierarchical, plain, alone, mirrored nodes."""
    run, source = Run(num_micro_batches=8, compute=compute), None
    for index, (size, stage, settings) in enumerate([(4, 3, HPZ), (2, 2, {}), (1, 0, {}), (4, 3, MICS)]):
        arrangement = run._replace(stage=stage, settings=settings)
        answers = ranks.run(leg, arrangement, source, range(2 * index, 2 * index + 2), size=size)
        source = Memory(assembled(pieces for pieces, _, _ in answers), *answers[0][1:])
    assert source is not None
    assert_same_bits(assembled(pieces for pieces, _, _ in answers), assemble_run(ranks, run, size=1))


def bytes_held(rank: Rank, run: Run) -> tuple[ds_zero.MemoryReport, int, int]:
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(1))
    flats = [flat for unit in sharded._units for flat in unit.flats]
    return sharded.memory(), sum(p.numel() for p in model.parameters()), sum(flat.layout.padding for flat in flats)


@pytest.mark.parametrize(("stage", "hybrid"), HYBRIDS, ids=IDS)
def test_memory_is_what_the_triple_says(ranks: RankPool, stage: int, hybrid: dict[str, int]) -> None:
    run = Run(stage=stage, compute=torch.bfloat16, model=MODEL, settings=hybrid)
    for report, numel, padding in ranks.run(bytes_held, run, size=4):
        in_node, everywhere = numel / 2, numel / 4
        state = everywhere if hybrid is HPZ else in_node
        leaf = 2 * numel if stage == 1 else 0
        # sums live in the shard of all ranks; where state is the node's, they are gathered into the node's interval
        want = {"param": 2 * (in_node if stage == 3 else numel), "grad": 4 * state + leaf, "state": 12 * state}
        for kind, wanted in want.items():
            assert abs(getattr(report, kind) - wanted) <= 0.01 * wanted + 16 * padding, kind


class Frozen(nn.Module):
    """Trained and frozen parameters in every unit."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(3)])
        for block in self.blocks:
            block[0].requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.square().sum()


def train_frozen(rank: Rank, stage: int, settings: dict[str, int]) -> list[Any]:
    torch.manual_seed(0)
    model = Frozen()
    config = ds_zero.ZeroConfig(stage=stage, **settings)
    sharded = ds_zero.shard(model, lambda g: torch.optim.Adam(g, lr=0.01), config=config, group=rank.group)
    for step in range(3):
        for index in range(rank.rank, 4, rank.size):
            model(torch.randn(2, 16, generator=torch.Generator().manual_seed(4 * step + index))).backward()
        sharded.step()
    return exported(sharded)


@pytest.mark.parametrize(("stage", "hybrid"), HYBRIDS, ids=IDS)
def test_frozen_parameters(ranks: RankPool, stage: int, hybrid: dict[str, int]) -> None:
    several = assembled(ranks.run(train_frozen, stage, hybrid, size=4))
    assert_same_bits(several, assembled(ranks.run(train_frozen, 0, {}, size=1)))


def kind_of(rank: Rank, settings: dict[str, int]) -> list[int]:
    sharded = ds_zero.shard(seeded(), None, group=rank.group, config=ds_zero.ZeroConfig(stage=3, **settings))
    mesh = sharded._shared.mesh
    return [mesh.everyone.size, mesh.node.size, mesh.across.size, mesh.everyone.rank]


def test_ranks_of_a_node_are_consecutive(ranks: RankPool) -> None:
    assert ranks.run(kind_of, MICS, size=4) == [[4, 2, 2, 0], [4, 2, 2, 2], [4, 2, 2, 1], [4, 2, 2, 3]]


@pytest.mark.parametrize("settings", [{"mics_shard_size": 4}, {}])
def test_one_node_is_no_node(ranks: RankPool, settings: dict[str, int]) -> None:
    assert ranks.run(kind_of, settings, size=4) == [[4, 4, 1, rank] for rank in range(4)]


def refusal(rank: Rank) -> str:
    with pytest.raises(ValueError, match="whole number") as caught:
        kind_of(rank, {"mics_shard_size": 3})
    return str(caught.value)


def test_nodes_have_to_come_out_even(ranks: RankPool) -> None:
    assert set(ranks.run(refusal, size=4)) == {
        "mics_shard_size = 3: 4 ranks are not a whole number of such nodes; use a divisor of 4"
    }


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mics_shard_size": 0}, "positive"),
        ({"zero_hpz_partition_size": 0}, "positive"),
        ({"stage": 3, "mics_shard_size": 2, "zero_hpz_partition_size": 2}, "exclude each other"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "needs stage 3, got 2"),
    ],
)
def test_settings_that_contradict(settings: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ds_zero.ZeroConfig(**settings)


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_intervals_nest_and_tile(nodes: int, node_size: int) -> None:
    size = nodes * node_size
    layout = plan([Spec("w", torch.Size([9999]), 0)], size)
    owners: dict[tuple[int, int], int] = {}
    for rank in range(size):
        node, across, everyone = (LocalCollectives(TorchKernels()) for _ in range(3))
        node.rank, node.size, across.rank, across.size = rank % node_size, node_size, rank // node_size, nodes
        everyone.rank, everyone.size = rank, size
        two = TwoLevelCollectives(everyone, node, across)
        mesh = Mesh(two, node, across)
        shard, part, whole = (
            mesh.range_of(kind, layout) for kind in (Placement.SHARD, Placement.NODE, Placement.REPLICATE)
        )
        assert whole == (0, layout.length)
        assert part[0] <= shard[0] < shard[1] <= part[1]
        owners[shard] = rank
    assert sorted(start for start, _ in owners) == [layout.shard_numel * i for i in range(size)]
