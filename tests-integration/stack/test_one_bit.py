"""1-bit optimizers over partitioned state: equal to the plain loop and to the equations, saved, resized, counted."""

from __future__ import annotations

from typing import Any, NamedTuple

import ds_core
import ds_zero
import pytest
import torch
from ds_comm.codecs import BlockCodec, CastCodec, E8Codec
from ds_comm.optim import Link
from ds_comm.optim import OneBitAdam as PlainOneBitAdam
from ds_comm.optim import OneBitLamb as PlainOneBitLamb
from ds_comm.optim import ZeroOneAdam as PlainZeroOneAdam
from ds_comm.sharded.one_bit_adam import OneBitAdam
from ds_comm.sharded.one_bit_lamb import OneBitLamb
from ds_comm.sharded.zero_one_adam import Intervals, ZeroOneAdam
from ds_comm.traffic import Traffic
from ds_testkit import Rank, RankPool
from ds_testkit.state import Exported, State, assembled, exported
from ds_testkit.traffic import CountedCollectives
from ds_testkit.traffic import Traffic as Counted
from ds_zero.collectives import collectives_of
from ds_zero.kernels import TorchKernels
from torch import Tensor, nn

pytestmark = pytest.mark.rung_c

FREEZE = 3
HYPER: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1}


class Block(nn.Module):
    """A linear form of its parameters: their gradients are what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 21))
        self.bias = nn.Parameter(torch.randn(37))

    def forward(self, weight: Tensor, bias: Tensor) -> Tensor:
        return (self.weight * weight).sum() + (self.bias * bias).sum()


class Form(nn.Module):
    """Two units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, gradients: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([block(*given) for block, given in zip(self.blocks, gradients, strict=True)]).sum()


def gradients_of(worker: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """Multiples of 2^-6 below 2^6: their sums are exact in any order."""
    generator = torch.Generator().manual_seed(1000 * step + worker)
    shared = torch.Generator().manual_seed(7 + step)

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=shared) + 0.5 * torch.randn(shape, generator=generator)
        return (values * 64).round() / 64

    return [(drawn(20, 21), drawn(37)) for _ in range(2)]


def codec_of(code: str) -> BlockCodec | E8Codec:
    return E8Codec(block=64) if code == "e8" else BlockCodec(code=code, block=64)


def sharded_as(
    rank: Rank, code: str = "ternary", zero: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> ds_zero.Sharded:
    return ds_zero.shard(
        Form(),
        lambda groups: OneBitAdam(groups, **HYPER, freeze_step=FREEZE, bias_correction=True, codec=codec_of(code)),
        config=ds_zero.ZeroConfig(**{"stage": 1, **(zero or {})}),
        group=rank.group,
        precision=ds_zero.Precision(compute=dtype),
    )


def trained(sharded: ds_zero.Sharded, rank: Rank, steps: list[int], micro_batches: int = 1) -> None:
    for step in steps:
        for micro_batch in range(micro_batches):
            sharded.module(gradients_of(rank.rank + micro_batch * rank.size, step)).backward()
        sharded.step()


def weights_of(sharded: ds_zero.Sharded) -> list[Tensor]:
    return [param.detach().clone() for param in sharded.module.parameters()]


# Against the plain loop #


def flattened(layout: Any, named: dict[str, Tensor]) -> Tensor:
    flat = torch.zeros(layout.length)
    for slot in layout.slots:
        flat[slot.offset : slot.end] = named[slot.name].reshape(-1)
    return flat


def against_plain(rank: Rank, code: str, stage: int, micro_batches: int) -> list[tuple[Tensor, Tensor]]:
    """Weights of both after each step: the plain loop steps one parameter laid out as the flat buffer."""
    sharded = sharded_as(rank, code, {"stage": stage})
    layouts = [flat.layout for flat in sharded._flats]
    start = {name: param.detach() for name, param in sharded.module.named_parameters()}
    params = [nn.Parameter(flattened(layout, start)) for layout in layouts]
    settings = {"freeze_step": FREEZE, "bias_correction": True, "codec": codec_of(code)}
    # two optimizers: messages of one would not be cut where buffers end
    plain = [PlainOneBitAdam([param], **HYPER, **settings, link=Link(group=rank.group)) for param in params]
    seen = []
    for step in range(1, 11):
        trained(sharded, rank, [step], micro_batches)
        own = [gradients_of(rank.rank + index * rank.size, step) for index in range(micro_batches)]
        for block, (layout, param, optimizer) in enumerate(zip(layouts, params, plain, strict=True)):
            mean = [torch.stack([each[block][i] for each in own]).sum(0) / micro_batches for i in (0, 1)]
            named = {f"blocks.{block}.weight": mean[0], f"blocks.{block}.bias": mean[1]}
            param.grad = flattened(layout, named)
            optimizer.step()
        for layout, param in zip(layouts, params, strict=True):
            for slot in layout.slots:
                got = sharded.module.get_parameter(slot.name).detach().reshape(-1).clone()
                seen.append((got, param.detach()[slot.offset : slot.end].clone()))
    return seen


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("stage", "micro_batches", "code"), [(0, 1, "e8"), (1, 1, "ternary"), (2, 2, "e8")])
def test_every_step_has_the_bits_of_the_plain_loop(
    ranks: RankPool, stage: int, micro_batches: int, code: str, size: int
) -> None:
    found = ranks.run(against_plain, code, stage, micro_batches, size=size)
    for seen in found:
        assert len(seen) == 40
        assert all(torch.equal(got, want) for got, want in seen)
        assert not torch.equal(seen[-4][0], seen[-8][0]), "weights move"
    for (first, _), (last, _) in zip(found[0], found[-1], strict=True):
        assert torch.equal(first, last), "ranks agree"


# Memory #


def held(rank: Rank, dtype: torch.dtype | None) -> tuple[int, int, int]:
    """Bytes of state in a later step, elements of all buffers, and of the longest."""
    sharded = sharded_as(rank, dtype=dtype)
    trained_as = [tuple(x.to(dtype) for x in each) for each in gradients_of(rank.rank, 1)]
    for _ in range(FREEZE + 2):
        sharded.module(trained_as).backward()
        sharded.step()
    sharded.module(trained_as).backward()
    with pytest.raises(RuntimeError, match="there is no mean to be read"):
        sharded.access.full_grad("blocks.0.weight")
    lengths = [flat.layout.length for flat in sharded._flats]
    return sharded.memory().state, sum(lengths), max(lengths)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_moments_masters_and_server_errors_are_sharded(ranks: RankPool, dtype: torch.dtype | None) -> None:
    size = 4
    for state, numel, longest in ranks.run(held, dtype, size=size):
        sharded, whole = (12, 8) if dtype is None else (16, 12)
        payloads = 2 * (64 / 5 + 1 + 4) / 64  # ternary in blocks of 64, sent and received
        assert state <= (sharded / size + whole + payloads) * numel + 4 * longest
        assert state > (sharded / size + whole) * 0.9 * numel, "segments hold no padding at the end"


# Against the equations #


class Equations:
    """1-bit Adam of all workers in one process: the paper's equations on one buffer, with a slice for each server."""

    def __init__(self, workers: int, start: Tensor, code: str) -> None:
        self.codec, self.workers = codec_of(code), workers
        self.p, self.m, self.v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        self.worker_errors = torch.zeros(workers, start.numel())
        self.server_error = torch.zeros_like(start)
        self.step = 0

    def coded(self, x: Tensor) -> Tensor:
        return torch.cat([self.codec.decode(self.codec.encode(part), part.clone()) for part in x.chunk(self.workers)])

    def update(self, gradients: Tensor) -> None:
        """``gradients``: [workers, numel]."""
        self.step += 1
        (b1, b2), lr, eps = HYPER["betas"], HYPER["lr"], HYPER["eps"]
        if self.step <= FREEZE:
            mean = gradients.mean(0)
            self.m, self.v = b1 * self.m + (1 - b1) * mean, b2 * self.v + (1 - b2) * mean**2
            m, v = self.m / (1 - b1**self.step), self.v / (1 - b2**self.step)
            if self.step == FREEZE:
                self.m, self.v = m, v
        else:
            own = b1 * self.m + (1 - b1) * gradients
            if self.workers > 1:
                sent = torch.stack([self.coded(each) for each in own + self.worker_errors])
                self.worker_errors += own - sent
                total = sent.mean(0) + self.server_error
                self.m = self.coded(total)
                self.server_error = total - self.m
            else:
                self.m = own[0]
            m, v = self.m, self.v
        self.p = self.p - lr * (m / (v.sqrt() + eps) + HYPER["weight_decay"] * self.p)

    @property
    def owed(self) -> Tensor:
        return self.worker_errors.mean(0) + self.server_error


def after(rank: Rank, steps: list[int], code: str, saved: Any = None) -> tuple[list[Exported], Any, Any]:
    """Train, after loading ``saved`` if there is any, and save."""
    sharded = sharded_as(rank, code)
    if saved is not None:
        sharded.load_state(saved)
    trained(sharded, rank, steps)
    scalars = sharded.state().scalars
    return exported(sharded), scalars, [(flat.layout.slots, flat.layout.length) for flat in sharded._flats]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ten_steps_follow_the_equations(ranks: RankPool, size: int) -> None:
    found = ranks.run(after, list(range(1, 11)), "ternary", size=size)
    whole = assembled(pieces for pieces, _, _ in found)
    torch.manual_seed(0)
    start = {name: param.detach() for name, param in Form().named_parameters()}
    for block, (slots, length) in enumerate(found[0][2]):
        layout = _Layout(slots, length)
        equations = Equations(size, flattened(layout, start), "ternary")
        for step in range(1, 11):
            of_all = [gradients_of(worker, step)[block] for worker in range(size)]
            equations.update(torch.stack([flattened(layout, _named(block, each)) for each in of_all]))
        for slot in slots:
            part = slice(slot.offset, slot.end)
            wanted = {"param": equations.p, "exp_avg": equations.m, "exp_avg_sq": equations.v, "error": equations.owed}
            for role, want in wanted.items():
                torch.testing.assert_close(whole[role, slot.name], want[part], rtol=1e-4, atol=1e-5)


class _Layout(NamedTuple):
    slots: Any
    length: int


def _named(block: int, given: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {f"blocks.{block}.weight": given[0], f"blocks.{block}.bias": given[1]}


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


def saved_of(found: list[tuple[list[Exported], Any, Any]]) -> Saved:
    shapes = {(piece.role, piece.name): piece.shape for pieces, _, _ in found for piece in pieces}
    return Saved(assembled(pieces for pieces, _, _ in found), shapes, found[0][1])


@pytest.mark.parametrize("code", ["ternary", "sign"])
def test_what_was_sent_and_what_is_owed_is_what_was_true_from_four_to_two_ranks(ranks: RankPool, code: str) -> None:
    """m_t - beta m_(t-1) is what was sent of (1 - beta) g_t, before and after the number of ranks changes."""
    warm = saved_of(ranks.run(after, list(range(1, FREEZE + 1)), code, size=4))
    m = {name: values for (role, name), values in warm.whole.items() if role == "exp_avg"}
    missing = {name: torch.zeros_like(values, dtype=torch.float64) for name, values in m.items()}
    assert not any(role == "error" for role, _ in warm.whole), "nothing was coded yet"
    saved = warm
    for step in range(FREEZE + 1, FREEZE + 9):
        size = 4 if step < FREEZE + 5 else 2
        saved = saved_of(ranks.run(after, [step], code, saved, size=size))
        for name in m:
            block, index = int(name.split(".")[1]), int(name.endswith("bias"))
            true = torch.stack([gradients_of(worker, step)[block][index] for worker in range(size)]).mean(0).reshape(-1)
            beta = HYPER["betas"][0]
            missing[name] += (beta * m[name].double() + (1 - beta) * true.double()) - saved.whole["exp_avg", name]
            m[name] = saved.whole["exp_avg", name]
    for name, owed in missing.items():
        assert owed.norm() > 0.01
        torch.testing.assert_close(saved.whole["error", name].double(), owed, rtol=1e-5, atol=1e-5)


def resumed(rank: Rank, saved: Saved, dtype: torch.dtype | None) -> bool:
    """Whether loading in the same process and going on gives the weights of a fresh model that loads."""
    used, fresh = (sharded_as(rank, dtype=dtype) for _ in range(2))
    trained(used, rank, list(range(20, 27)))
    for sharded in (used, fresh):
        sharded.load_state(saved)
        trained(sharded, rank, [30, 31])
    return all(map(torch.equal, weights_of(used), weights_of(fresh)))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nothing_of_before_a_load_is_left(ranks: RankPool, dtype: torch.dtype | None) -> None:
    saved = saved_of(ranks.run(after, list(range(1, FREEZE + 3)), "ternary", size=4))
    assert all(ranks.run(resumed, saved, dtype, size=2))


# Precision, writes from outside, bad gradients #


def in_bfloat16(rank: Rank) -> tuple[list[Tensor], list[Exported], list[Exported]]:
    exact, low = sharded_as(rank), sharded_as(rank, dtype=torch.bfloat16)
    for step in range(1, 9):
        trained(exact, rank, [step])
        low.module([tuple(x.bfloat16() for x in each) for each in gradients_of(rank.rank, step)]).backward()
        low.step()
    return weights_of(low), exported(low), exported(exact)


def test_bfloat16_rounds_exact_weights_that_are_the_same_everywhere(ranks: RankPool) -> None:
    found = ranks.run(in_bfloat16, size=2)
    assert all(map(torch.equal, found[0][0], found[1][0]))
    low, exact = (assembled(pieces[i] for pieces in found) for i in (1, 2))
    for (role, name), values in low.items():
        if role == "param":
            weights = dict(zip(dict(Form().named_parameters()), found[0][0], strict=True))[name]
            assert torch.equal(values.bfloat16(), weights.reshape(-1))
            assert (values - exact[role, name]).abs().max() < 0.1


def written(rank: Rank, dtype: torch.dtype | None) -> list[Tensor]:
    sharded = sharded_as(rank, dtype=dtype)
    trained(sharded, rank, list(range(1, FREEZE + 3)))
    name = "blocks.1.bias"
    sharded.access.set_full_param(name, torch.full((37,), 3.0))
    before = weights_of(sharded)
    trained(sharded, rank, [FREEZE + 3])
    after_step = weights_of(sharded)
    assert (before[3] == 3).all()
    assert (before[3] - after_step[3]).abs().max() < 0.5
    return after_step


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_weight_that_was_written_is_stepped(ranks: RankPool, dtype: torch.dtype | None) -> None:
    first, second = ranks.run(written, dtype, size=2)
    assert all(map(torch.equal, first, second))


def with_a_bad_gradient(rank: Rank) -> None:
    sharded = sharded_as(rank)
    trained(sharded, rank, list(range(1, FREEZE + 3)))
    before = exported(sharded)
    bad = gradients_of(rank.rank, 9)
    if rank.rank == 1:
        bad[1][1][5] = torch.inf
    sharded.module(bad).backward()
    assert sharded.grad_norm().culprit == "blocks.1.bias"
    with pytest.raises(FloatingPointError, match=r"gradient of blocks\.1\.bias is not finite on some rank"):
        sharded.step()
    sharded.drop_gradients()
    assert all(torch.equal(a.data, b.data) for a, b in zip(before, exported(sharded), strict=True))
    trained(sharded, rank, [10])


def test_a_gradient_that_is_not_finite_changes_nothing(ranks: RankPool) -> None:
    ranks.run(with_a_bad_gradient, size=2)


def refusals(rank: Rank) -> None:
    with pytest.raises(ValueError, match="at stage 3 no rank has them; use stage 0, 1 or 2"):
        sharded_as(rank, zero={"stage": 3})
    with pytest.raises(ValueError, match="remove mics_shard_size, or use another optimizer"):
        sharded_as(rank, zero={"mics_shard_size": 2})
    with pytest.raises(ValueError, match=r"require_exact = True, but .*OneBitAdam rounds what it sends"):
        sharded_as(rank, zero={"require_exact": True})


def test_what_cannot_be_is_refused(ranks: RankPool) -> None:
    ranks.run(refusals, size=4)


# 1-bit LAMB #


LAMB: dict[str, Any] = {**HYPER, "lr": 0.01}


def lamb_against_plain(rank: Rank, stage: int) -> list[tuple[Tensor, Tensor]]:
    """Weights of both after each step, with a code that loses nothing: the plain loop's blocks lie elsewhere."""
    codec = CastCodec(dtype=torch.float32)
    sharded = ds_zero.shard(
        Form(),
        lambda groups: OneBitLamb(groups, **LAMB, freeze_step=FREEZE, bias_correction=True, codec=codec),
        config=ds_zero.ZeroConfig(stage=stage),
        group=rank.group,
    )
    plain_model = Form()
    plain = PlainOneBitLamb(
        plain_model.parameters(),
        **LAMB,
        freeze_step=FREEZE,
        bias_correction=True,
        codec=codec,
        link=Link(group=rank.group),
    )
    seen = []
    for step in range(1, 13):
        trained(sharded, rank, [step])
        plain.zero_grad()
        plain_model(gradients_of(rank.rank, step)).backward()
        plain.step()
        for got, want in zip(sharded.module.parameters(), plain_model.parameters(), strict=True):
            seen.append((got.detach().reshape(-1).clone(), want.detach().reshape(-1).clone()))
    return seen


@pytest.mark.parametrize(("size", "stage"), [(1, 1), (2, 2), (4, 1)])
def test_lamb_takes_the_plain_loops_steps(ranks: RankPool, size: int, stage: int) -> None:
    found = ranks.run(lamb_against_plain, stage, size=size)
    for got, want in found[0]:
        torch.testing.assert_close(got, want, rtol=0, atol=5e-6)
    moved = [(found[0][-4 + i][0] - found[0][i][0]).abs().max() for i in range(4)]
    assert min(moved) > 0.05, "the steps are larger than the tolerance by far"
    for other in found[1:]:
        assert all(torch.equal(first, second) for (first, _), (second, _) in zip(found[0], other, strict=True))


# 0/1 Adam #

ROUNDS = Intervals(var_freeze_step=8, var_update_scaler=2, local_step_scaler=3, local_step_clipper=4)


def zero_one_against_plain(rank: Rank, stage: int) -> list[tuple[int, Tensor, Tensor]]:
    """Where in a round, and weights of both, after each step."""
    codec = codec_of("ternary")
    sharded = ds_zero.shard(
        Form(),
        lambda groups: ZeroOneAdam(groups, **HYPER, bias_correction=True, intervals=ROUNDS, codec=codec),
        config=ds_zero.ZeroConfig(stage=stage),
        group=rank.group,
    )
    layouts = [flat.layout for flat in sharded._flats]
    start = {name: param.detach() for name, param in sharded.module.named_parameters()}
    params = [nn.Parameter(flattened(layout, start)) for layout in layouts]
    settings = {**ROUNDS._asdict(), "bias_correction": True, "codec": codec, "link": Link(group=rank.group)}
    plain = [PlainZeroOneAdam([param], **HYPER, **settings) for param in params]
    seen = []
    for step in range(1, 29):
        trained(sharded, rank, [step])
        for block, (layout, param, optimizer) in enumerate(zip(layouts, params, plain, strict=True)):
            param.grad = flattened(layout, _named(block, gradients_of(rank.rank, step)[block]))
            optimizer.step()
            for slot in layout.slots:
                got = sharded.module.get_parameter(slot.name).detach().reshape(-1).clone()
                within = sharded.optimizer.param_groups[0]["round_step"]
                seen.append((within, got, param.detach()[slot.offset : slot.end].clone()))
    return seen


@pytest.mark.parametrize(("size", "stage"), [(1, 1), (2, 2), (4, 1)])
def test_zero_one_adam_has_the_bits_of_the_plain_loop(ranks: RankPool, size: int, stage: int) -> None:
    found = ranks.run(zero_one_against_plain, stage, size=size)
    for seen in found:
        assert [index for index, (_, got, want) in enumerate(seen) if not torch.equal(got, want)] == []
    assert max(within for within, _, _ in found[0]) == 3, "rounds have several steps"
    for (within, first, _), (_, last, _) in zip(found[0], found[-1], strict=True):
        assert torch.equal(first, last) or within, "ranks agree between rounds"


# By configuration #


def run_of(
    rank: Rank, optimizer: dict[str, Any], steps: int, folder: str | None = None, first: int = 0
) -> tuple[list[float], list[Tensor], tuple[int, int], Any]:
    """Losses, weights, bytes sent and received after the warm-up, and what is saved of LAMB's tensors.

    Saves to ``folder``, or begins there.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    engine, made, *_ = ds_core.initialize(
        model,
        config={
            "train_micro_batch_size_per_gpu": 32 // rank.size,
            "optimizer": optimizer,
            "zero_optimization": {"stage": 1},
        },
        group=rank.group,
    )
    if folder is not None and first:
        engine.load_checkpoint(folder)
    numbers = made.param_groups[0].get("scaling_coeff")
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 * step + rank.rank)
        x = torch.randn(32 // rank.size, 64, generator=generator)
        loss = (engine(x).float() - x.flip(1)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if optimizer["type"] == "ZeroOneAdam":
        if folder is not None and not first:
            with pytest.raises(RuntimeError, match=r"call after 2 steps of a round: call synchronize\(\) of the opt"):
                engine.save_checkpoint(folder)
        made.synchronize()
    if folder is not None and not first:
        engine.save_checkpoint(folder)
        numbers = made.param_groups[0].get("scaling_coeff")
    traffic = getattr(made, "traffic", Traffic())
    return losses, weights_of(engine._sharded), (traffic.sent, traffic.received), numbers


def one_bit(code: str = "e8", name: str = "OneBitAdam") -> dict[str, Any]:
    lr = {"OneBitAdam": 3e-3, "OneBitLamb": 1e-2, "ZeroOneAdam": 3e-3}[name]
    own: dict[str, Any] = {"freeze_step": 20}
    if name == "ZeroOneAdam":
        own = {"var_freeze_step": 20, "var_update_scaler": 4, "local_step_scaler": 4, "local_step_clipper": 4}
    return {"type": name, "params": {"lr": lr, "code": code, "bias_correction": True, "cuda_aware": False, **own}}


NUMEL = 64 * 256 + 256 + 256 * 64 + 64


@pytest.mark.parametrize(("size", "code"), [(2, "ternary"), (4, "sign"), (4, "e8")])
def test_a_configuration_of_deepspeed_trains_within_a_quarter_of_a_byte(ranks: RankPool, size: int, code: str) -> None:
    found = ranks.run(run_of, one_bit(code), 60, size=size)
    losses, exact = (
        torch.tensor([each[0] for each in runs]).mean(0)
        for runs in (found, ranks.run(run_of, {"type": "AdamW", "params": {"lr": 3e-3}}, 60, size=size))
    )
    assert torch.allclose(losses[:20], exact[:20], rtol=1e-3), "the warm-up is Adam"
    assert exact[-5:].mean() < 0.5 * exact[20]
    assert losses[-5:].mean() < 1.5 * exact[-5:].mean()
    for other in found[1:]:
        assert all(map(torch.equal, found[0][1], other[1]))
    for sent, received in (each[2] for each in found):
        assert sent == received
        assert 0.06 * NUMEL * 40 < sent <= 0.27 * NUMEL * 40


@pytest.mark.parametrize("name", ["OneBitAdam", "OneBitLamb", "ZeroOneAdam"])
def test_a_checkpoint_of_four_ranks_goes_on_on_two(ranks: RankPool, tmp_path: Any, name: str) -> None:
    folder, optimizer = str(tmp_path), one_bit(name=name)
    saved = ranks.run(run_of, optimizer, 30, folder, size=4)
    found = ranks.run(run_of, optimizer, 20, folder, 30, size=2)
    assert found[0][3] == saved[0][3], "numbers of tensors"
    assert all(map(torch.equal, found[0][1], found[1][1]))
    before, after_load = (torch.tensor([each[0] for each in runs]).mean(0) for runs in (saved, found))
    assert after_load[0] < 1.1 * before[-3:].max()
    assert after_load[-3:].mean() < 0.9 * before[-3:].mean()


def counted(rank: Rank, code: str) -> tuple[int, int, float]:
    """Bytes that all calls of one step send, what the optimizer says of it, and 0.27 bytes for each parameter."""
    traffic = Counted()
    codec = E8Codec() if code == "e8" else BlockCodec(code=code, scale_dtype=torch.float16)
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
    inner = collectives_of(rank.group, kernels=TorchKernels(), device=torch.device("cpu"), host_memory=False)
    sharded = ds_zero.shard(
        model,
        lambda groups: OneBitAdam(groups, lr=1e-3, freeze_step=1, codec=codec),
        config=ds_zero.ZeroConfig(stage=1),
        parts=ds_zero.Parts(collectives=CountedCollectives(inner, traffic)),
    )
    said = 0
    for step in range(4):
        traffic.clear()
        said = sharded.optimizer.traffic.sent
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(step * rank.size + rank.rank))
        model(x).square().mean().backward()
        sharded.step()
    numel = sum(param.numel() for param in model.parameters())
    return sum(traffic.nbytes.values()), sharded.optimizer.traffic.sent - said, 0.27 * numel


def test_nothing_is_sent_besides_the_codes(ranks: RankPool) -> None:
    for size, code in ((2, "ternary"), (4, "sign"), (4, "e8")):
        for all_bytes, said, allowed in ranks.run(counted, code, size=size):
            assert said <= all_bytes <= allowed
            assert all_bytes - said <= 8 * 2 * size, "two numbers for the norm"
