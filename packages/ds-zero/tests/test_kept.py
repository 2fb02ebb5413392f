"""Modules kept in float32 in a model that computes in bfloat16."""

from __future__ import annotations

from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import micro_batch, seeded
from ds_testkit.state import assembled, assert_same_bits, exported
from torch import Tensor, nn

pytestmark = pytest.mark.rung_c

LOW = torch.bfloat16


def trained(rank: Rank, stage: int, names: tuple[str, ...]) -> tuple[list[str], list[Any]]:
    model = seeded()
    sharded = ds_zero.shard(
        model,
        lambda groups: torch.optim.SGD(groups, lr=0.1),
        config=ds_zero.ZeroConfig(stage=stage),
        group=rank.group,
        precision=ds_zero.Precision(compute=LOW, keep_fp32=names),
    )
    kept = [name for name, param in model.named_parameters() if param.dtype == torch.float32]
    for step in range(3):
        for index in range(rank.rank, 2, rank.size):
            model(micro_batch(2 * step + index)).backward()
        sharded.step()
    return kept, exported(sharded)


class Wide(nn.Module):
    """The definition: a float32 module that takes and gives bfloat16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.float()).to(LOW)
        return out


def plain(names: tuple[str, ...]) -> dict[str, Tensor]:
    model = seeded()
    masters = {name: param.detach().clone() for name, param in model.named_parameters()}
    model.to(LOW)
    for path, module in list(model.named_modules()):
        if type(module).__name__ in names or path.split(".")[-1] in names:
            parent, _, key = path.rpartition(".")
            setattr(model.get_submodule(parent), key, Wide(module.float()))
    params = {name.replace(".inner", ""): param for name, param in model.named_parameters()}
    for step in range(3):
        leaves = []
        for index in range(2):
            with torch.no_grad():
                for name, param in params.items():
                    param.copy_(masters[name])
            grads = torch.autograd.grad(model(micro_batch(2 * step + index)), list(params.values()))
            leaves.append([grad.float() for grad in grads])
        for name, first, second in zip(params, *leaves, strict=True):
            masters[name].add_((first + second) * 0.5, alpha=-0.1)
    return masters


@pytest.mark.parametrize("names", [("LayerNorm", "RMSNorm"), ("norm", "out")])
def test_computes_as_the_definition_says(ranks: RankPool, names: tuple[str, ...]) -> None:
    want = plain(names)
    for size in (1, 2):
        for stage in (1, 3):
            results = ranks.run(trained, stage, names, size=size)
            got = assembled(pieces for _, pieces in results)
            expected = [name for name in want if names[0] == "LayerNorm" and "norm" in name]
            assert not expected or results[0][0] == expected
            assert_same_bits(got, {("param", name): value.flatten() for name, value in want.items()})


def test_names_that_match_nothing_and_shared_parameters_are_errors() -> None:
    wrong = ds_zero.Precision(compute=LOW, keep_fp32=("BatchNorm",))
    with pytest.raises(ValueError, match=r"keep_fp32 \['BatchNorm'\] match no module; classes present: .*'LayerNorm'"):
        ds_zero.shard(seeded(), torch.optim.AdamW, precision=wrong)
    halved = ds_zero.Precision(compute=LOW, keep_fp32=("head",))
    with pytest.raises(ValueError, match=r"parameter 'tokens.weight' is shared by a module that is kept"):
        ds_zero.shard(seeded(tied=True), torch.optim.AdamW, precision=halved)
