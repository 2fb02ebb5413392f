"""What differs between ranks, or was passed wrongly, is named before anything is partitioned."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import seeded
from ds_zero import shard
from ds_zero.optim import Muon
from torch import nn

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "stage": ({"stage": 2}, r"ZeroConfig.stage"),
    "transport": ({"host_memory": False}, r"ZeroConfig.host_memory"),
    "nodes": ({"mics_shard_size": 1}, r"ZeroConfig.mics_shard_size"),
}


def refused(rank: Rank, settings: dict[str, Any], make_optimizers: list[Any], message: str) -> str:
    config = {"stage": 3, **(settings if rank.rank == 1 else {})}
    make_optimizer = make_optimizers[rank.rank % len(make_optimizers)]
    with pytest.raises(ValueError, match=message) as caught:
        shard(seeded(), make_optimizer, config=ds_zero.ZeroConfig(**config), group=rank.group)
    return str(caught.value)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_differ_are_named_on_all_ranks(ranks: RankPool, name: str) -> None:
    settings, message = SETTINGS[name]
    texts = ranks.run(refused, settings, [torch.optim.AdamW], message, size=2)
    assert texts[0] == texts[1]
    assert texts[0].startswith("ranks [1] were given other settings than rank 0: ")


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


def slow_adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-4)


def half(groups: Any) -> torch.optim.Optimizer:
    [group] = groups
    params = group["params"]
    return torch.optim.AdamW([{"params": params[:3]}, {"params": params[3:]}])


@pytest.mark.parametrize(
    ("other", "message"),
    [(sgd, "the class of the optimizer|settings"), (slow_adamw, "lr of group 0"), (half, "number of .* groups")],
)
def test_optimizers_that_differ_are_named_on_all_ranks(ranks: RankPool, other: Any, message: str) -> None:
    ranks.run(refused, {}, [torch.optim.AdamW, other], message, size=2)


def test_ranks_that_agree_on_odd_settings_are_left_alone(ranks: RankPool) -> None:
    ranks.run(agreeing, size=2)


def agreeing(rank: Rank) -> None:
    def make(groups: Any) -> torch.optim.Optimizer:
        entries = [{**group, "mark": object(), "schedule": lambda step: step, "nan": float("nan")} for group in groups]
        return torch.optim.AdamW(entries, lr=torch.tensor(0.1))

    shard(seeded(), make, config=ds_zero.ZeroConfig(stage=2), group=rank.group)


# Mistakes on one rank #


def test_a_model_is_partitioned_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    shard(model, torch.optim.AdamW)
    with pytest.raises(ValueError, match="this model is partitioned already: build the model anew"):
        shard(model, torch.optim.AdamW)
    with pytest.raises(ValueError, match="part '1' of this model is partitioned already"):
        shard(nn.Sequential(nn.Linear(1, 1), model), torch.optim.AdamW)


def test_an_optimizer_in_place_of_a_function_is_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"got an object, a AdamW; pass for example lambda groups: AdamW\(groups"):
        shard(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"over other parameters .* not over model.parameters\(\)"):
        shard(model, lambda groups: torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match=r"returns a torch.optim.Optimizer; got None"):
        shard(model, lambda groups: None)  # type: ignore[arg-type,return-value]
    shard(model, torch.optim.AdamW)  # nothing was changed


def test_a_string_in_place_of_names_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unit_classes is a sequence of names; got the string 'Block'; write \('Blo"):
        ds_zero.ZeroConfig(unit_classes="Block")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_fp32 is a sequence of names"):
        ds_zero.Precision(keep_fp32="LayerNorm")  # type: ignore[arg-type]
    sharded = shard(nn.Linear(2, 1), torch.optim.AdamW)
    with pytest.raises(ValueError, match="include is a sequence of names"):
        sharded.parking.offload_states("params")


@pytest.mark.parametrize("names", [("tok", "lm_head"), ("lm_head", "tok")])
def test_all_names_of_a_tied_parameter_decide_what_muon_does(names: tuple[str, str]) -> None:
    model = nn.Module()
    for name in names:
        model.register_module(name, nn.Linear(4, 4, bias=False))
    model.lm_head.weight = model.tok.weight
    sharded = shard(model, lambda groups: Muon(groups, lr=0.02, adam_lr=1e-3))
    assert sharded.optimizer is not None
    held = {group["use_muon"]: sum(p.numel() for p in group["params"]) for group in sharded.optimizer.param_groups}
    assert held == {True: 0, False: 16}


_WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None  # as where it is not installed
import torch, torch.distributed as dist, ds_zero
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
model = torch.nn.Linear(2, 1)
sharded = ds_zero.shard(model, torch.optim.AdamW, config=ds_zero.ZeroConfig(stage=3))
model(torch.ones(1, 2)).sum().backward()
sharded.step()
print(type(sharded.access.comm).__name__)
"""


def test_numpy_is_not_needed(tmp_path: Any) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _WITHOUT_NUMPY, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    for process in ranks:
        assert process.communicate(timeout=120)[0] == "HostCollectives\n"
        assert process.returncode == 0
