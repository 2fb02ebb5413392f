"""Training with coded weights and gradients: it learns, ranks agree to the bit, fewer bytes travel."""

from __future__ import annotations

from typing import Any, NamedTuple

import ds_core
import ds_zero
import pytest
import torch
from ds_comm import CompressedCollectives, LinkCost
from ds_comm.config import AutoConfig, CompressionConfig
from ds_comm.link_aware import LinkAwareCompression, Report
from ds_comm.plugin import Compression
from ds_core.config import parse
from ds_core.registry import load
from ds_testkit import Rank, RankPool
from ds_testkit.state import Exported, State, assembled, exported
from torch import Tensor, nn

pytestmark = pytest.mark.rung_c

STEPS = 12


class Seen(nn.Linear):
    """Remembers the weights it computed with."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.weight.detach().clone())
        return super().forward(x).relu()


class Recorded(Compression):
    """Keeps what it was put around."""

    def __init__(self, config: CompressionConfig) -> None:
        super().__init__(config)
        self.made: list[CompressedCollectives] = []

    def around(self, inner: Any) -> CompressedCollectives:
        self.made.append(super().around(inner))
        return self.made[-1]


class Outcome(NamedTuple):
    losses: list[float]
    seen: list[Tensor]
    wire: dict[str, int]  # bytes sent
    exact: dict[str, int]


def built() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Seen(48), Seen(48), nn.Linear(48, 1))


def batch_of(step: int, rank: Rank) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank.rank)
    x = torch.randn(16 // rank.size, 48, generator=generator)
    return x, x[:, :8].square().mean(1, keepdim=True)


def sharded_as(rank: Rank, zero: dict[str, Any], compression: Compression | None, dtype: torch.dtype | None) -> Any:
    return ds_zero.shard(
        built(),
        lambda groups: torch.optim.AdamW(groups, lr=3e-3),
        config=ds_zero.ZeroConfig(**zero),
        group=rank.group,
        precision=ds_zero.Precision(compute=dtype),
        parts=ds_zero.Parts(compression=compression),
    )


def stepped(sharded: Any, step: int, rank: Rank, dtype: torch.dtype | None = None) -> float:
    x, y = batch_of(step, rank)
    loss = (sharded.module(x.to(dtype)).float() - y).square().mean()
    loss.backward()
    sharded.step(1 / rank.size)
    return loss.item()


def trained(
    rank: Rank, zero: dict[str, Any], config: CompressionConfig | None, dtype: torch.dtype | None = None
) -> Outcome:
    compression = None if config is None else Recorded(config)
    sharded = sharded_as(rank, zero, compression, dtype)
    losses = [stepped(sharded, step, rank, dtype) for step in range(STEPS)]
    accounts = [] if compression is None else [made.accounts for made in compression.made]
    total = [
        {op: sum(each[op][kind].sent for each in accounts if op in each) for op in ("all_gather", "reduce_scatter")}
        for kind in (0, 1)
    ]
    return Outcome(losses, [weight for layer in sharded.module[:2] for weight in layer.seen], *total)


def means(outcomes: list[Outcome]) -> Tensor:
    return torch.tensor([outcome.losses for outcome in outcomes]).mean(0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_learns_as_without_codes_and_ranks_agree(ranks: RankPool, stage: int, size: int, dtype) -> None:
    config = CompressionConfig(weights="int8", gradients="int4")
    exact = ranks.run(trained, {"stage": stage}, None, dtype, size=size)
    coded = ranks.run(trained, {"stage": stage}, config, dtype, size=size)
    first, *others = coded
    for other in others:
        assert all(map(torch.equal, first.seen, other.seen))
    assert not all(map(torch.equal, first.seen, exact[0].seen)), "something was rounded"
    lost, kept = means(coded), means(exact)
    assert kept[-3:].mean() < 0.7 * kept[:3].mean(), "there is something to learn"
    assert torch.allclose(lost, kept, rtol=0.1, atol=0.02)
    width = 4 if dtype is None else 2
    for op, bits in (("all_gather", 8), ("reduce_scatter", 4)):
        # scales of 256 elements, and a byte of each message
        assert first.wire[op] <= first.exact[op] * (bits / 8 + 4 / 256) / width + 100 * STEPS * size


def test_differences_follow_weights_in_fewer_bits(ranks: RankPool) -> None:
    config = CompressionConfig(weights="int4", weight_differences=True)
    exact = ranks.run(trained, {"stage": 2}, None, size=2)
    coded = ranks.run(trained, {"stage": 2}, config, size=2)
    assert all(map(torch.equal, coded[0].seen, coded[1].seen))
    assert torch.allclose(means(coded), means(exact), rtol=0.02, atol=0.005)
    assert coded[0].wire["all_gather"] < coded[0].exact["all_gather"] / 4


@pytest.mark.parametrize("zero", [{"zero_hpz_partition_size": 2}, {"mics_shard_size": 2}])
def test_nodes_code_on_both_levels(ranks: RankPool, zero: dict[str, Any]) -> None:
    config = CompressionConfig(weights="int8", gradients="int4")
    exact = ranks.run(trained, {"stage": 3, **zero}, None, size=4)
    coded = ranks.run(trained, {"stage": 3, **zero}, config, size=4)
    for other in coded[1:]:
        assert all(map(torch.equal, coded[0].seen, other.seen))
    assert torch.allclose(means(coded), means(exact), rtol=0.1, atol=0.02)
    assert coded[0].wire["reduce_scatter"] < coded[0].exact["reduce_scatter"] / 4


AUTO = {"compression": {"auto": {"compute_seconds": 1e-9, "step_seconds": 1e-9}}}


def configured(rank: Rank, zero: dict[str, Any], more: dict[str, Any] | None = None) -> list[float]:
    engine, *_ = ds_core.initialize(
        built(),
        config={
            "train_micro_batch_size_per_gpu": 16 // rank.size,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
            "gradient_clipping": 0.0,
            **(more or {}),
            "zero_optimization": {"stage": 2, **zero, **(more or {}).get("zero_optimization", {})},
        },
        group=rank.group,
    )
    losses = []
    for step in range(STEPS):
        x, y = batch_of(step, rank)
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_the_keys_of_deepspeed_select_it(ranks: RankPool) -> None:
    quantized = {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    (exact, _), (coded, _) = (ranks.run(configured, zero, size=2) for zero in ({}, quantized))
    assert coded != exact
    assert torch.allclose(torch.tensor(coded), torch.tensor(exact), rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"communication_data_type": "bf16"}, CompressionConfig(gradients="bf16", error_feedback=False)),
        (
            {
                "zero_optimization": {
                    "zero_quantized_gradients": True,
                    "zeropp_loco_param": {"err_beta": 0.5, "reset_T": 4},
                }
            },
            CompressionConfig(gradients="int4", error_beta=0.5, error_reset=4),
        ),
    ],
)
def test_types_of_messages_and_averaged_errors(
    ranks: RankPool, keys: dict[str, Any], wanted: CompressionConfig
) -> None:
    assert parse({"train_batch_size": 4, **keys}, 2, load).plugins["collectives"].config == wanted
    (exact, _), (coded, _) = (ranks.run(configured, {}, more, size=2) for more in ({}, keys))
    assert coded != exact
    assert torch.allclose(torch.tensor(coded), torch.tensor(exact), rtol=0.1, atol=0.02)
    first, *_ = ranks.run(trained, {"stage": 2}, wanted, size=2)
    bits = 16 if wanted.gradients == "bf16" else 4 + 32 / 256
    assert first.wire["reduce_scatter"] <= first.exact["reduce_scatter"] * bits / 32 + 100 * STEPS


def test_the_configuration_shows_what_the_keys_mean() -> None:
    zero = {"stage": 2, "zero_quantized_gradients": True}
    config = parse({"train_batch_size": 4, "zero_optimization": zero}, 2, load)
    assert config.plugins["collectives"].config == CompressionConfig(gradients="int4")


def test_the_configuration_shows_what_auto_means() -> None:
    config = parse({"train_batch_size": 4, "compression": {"auto": {"step_seconds": 2}}}, 2, load)
    assert config.plugins["collectives"].config == CompressionConfig(auto=AutoConfig(step_seconds=2.0))
    with pytest.raises(ValueError, match=r"unknown key collectives\.auto\.seconds = 2"):
        parse({"train_batch_size": 4, "compression": {"auto": {"seconds": 2}}}, 2, load)


def chosen(rank: Rank, zero: dict[str, Any], bandwidths: list[float]) -> tuple[Outcome, Report]:
    """The outer level is slow."""
    costs = [LinkCost(latency=0.0, bandwidth=bandwidth) for bandwidth in bandwidths]
    auto = AutoConfig(step_seconds=0.5, compute_seconds=0.1, max_error=1.0)
    compression = LinkAwareCompression(CompressionConfig(auto=auto), costs=costs)
    made: list[CompressedCollectives] = []
    around = compression.around
    compression.around = lambda inner: made.append(around(inner)) or made[-1]  # type: ignore[method-assign]
    sharded = sharded_as(rank, zero, compression, None)
    losses = [stepped(sharded, step, rank) for step in range(STEPS)]
    sent = [{"reduce_scatter": sum(each.accounts["reduce_scatter"][kind].sent for each in made)} for kind in (0, 1)]
    assert compression.report is not None
    return Outcome(losses, [weight for layer in sharded.module[:2] for weight in layer.seen], *sent), compression.report


@pytest.mark.parametrize(
    ("zero", "bandwidths"), [({"stage": 2}, [2e4]), ({"stage": 3, "zero_hpz_partition_size": 2}, [1e9, 1e4])]
)
def test_codes_chosen_by_links_learn_alike_on_all_ranks(
    ranks: RankPool, zero: dict[str, Any], bandwidths: list[float]
) -> None:
    exact = ranks.run(trained, zero, None, size=4)
    (first, report), *others = ranks.run(chosen, zero, bandwidths, size=4)
    for other, its_report in others:
        assert its_report == report
        assert all(map(torch.equal, first.seen, other.seen))
    outcomes = [first, *(outcome for outcome, _ in others)]
    assert torch.allclose(means(outcomes), means(exact), rtol=0.1, atol=0.02)
    assert report.plan.met
    assert report.bytes_saved > 0
    outer = [
        code
        for bucket, code in zip(report.buckets, report.plan.codes)
        if bucket.name.startswith(f"{len(bandwidths) - 1}.")
    ]
    assert set(outer) != {"exact"}
    if len(bandwidths) == 2:
        inner = [code for bucket, code in zip(report.buckets, report.plan.codes) if bucket.name.startswith("0.")]
        assert set(inner) == {"exact"}, "within nodes there is time"
    assert first.wire["reduce_scatter"] < first.exact["reduce_scatter"]


def test_the_key_compression_selects_it(ranks: RankPool) -> None:
    (exact, _), (coded, _) = (ranks.run(configured, {}, more, size=2) for more in ({}, AUTO))
    assert torch.allclose(torch.tensor(coded), torch.tensor(exact), rtol=0.1, atol=0.02)


def refused(rank: Rank) -> None:
    with pytest.raises(ValueError, match="require_exact = True, but compressed collectives round what they send"):
        trained(rank, {"stage": 2, "require_exact": True}, CompressionConfig(gradients="int8"))


def test_exact_bits_and_codes_exclude_each_other(ranks: RankPool) -> None:
    ranks.run(refused, size=2)


# Checkpoints #


class Saved(NamedTuple):
    """Plays the role ``StateSource``."""

    whole: State
    shapes: dict[tuple[str, str], torch.Size]
    scalars: dict[str, Any]

    @property
    def roles(self) -> list[str]:
        return sorted({role for role, _ in self.whole})

    def shapes_of(self, role: str) -> dict[str, torch.Size]:
        return {name: shape for (each, name), shape in self.shapes.items() if each == role}

    def read(self, role: str, name: str, start: int, out: Tensor) -> None:
        out.copy_(self.whole[role, name][start : start + out.numel()])


def saved_after(rank: Rank, zero: dict[str, Any], source: Saved | None) -> tuple[list[Exported], Any]:
    """Train, or load ``source``, and save."""
    sharded = sharded_as(rank, zero, Compression(CompressionConfig(gradients="ternary")), None)
    if source is None:
        for step in range(3):
            stepped(sharded, step, rank)
    else:
        sharded.load_state(source)
    scalars = sharded.state().scalars
    return exported(sharded), scalars


@pytest.mark.parametrize("zero", [{"stage": 2}, {"stage": 3, "zero_hpz_partition_size": 2}])
def test_what_is_owed_survives_on_fewer_ranks(ranks: RankPool, zero: dict[str, Any]) -> None:
    found = ranks.run(saved_after, zero, None, size=4)
    whole = assembled(pieces for pieces, _ in found)
    shapes = {(piece.role, piece.name): piece.shape for pieces, _ in found for piece in pieces}
    owed = {key: values for key, values in whole.items() if key[0] == "gradient_error"}
    assert len(owed) == 6
    assert sum(float(values.norm()) for values in owed.values()) > 0
    again = ranks.run(saved_after, {"stage": 2}, Saved(whole, shapes, found[0][1]), size=2)
    loaded = assembled(pieces for pieces, _ in again)
    assert all(torch.equal(loaded[key], values) for key, values in owed.items())
