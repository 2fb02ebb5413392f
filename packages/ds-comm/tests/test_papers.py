"""Every optimizer, step for step, against the equations of its paper in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from ds_testkit import RankPool

from . import papers, training

STEPS = 24
CASES = [
    ("OneBitAdam", {}),
    ("OneBitAdam", {"bias_correction": True}),
    ("OneBitLamb", {}),
    ("OneBitLamb", {"bias_correction": True}),
    ("ZeroOneAdam", {}),
    ("ZeroOneAdam", {"bias_correction": True}),
    ("CompressedAdam", {}),
    ("CompressedAdam", {"bias_correction": False}),
    ("LocalSteps", {}),
]


def vector(key: str, index: int | None = None) -> Any:
    sizes = [sum(int(np.prod(training.SHAPES[i])) for i in group) for group in training.GROUPS]
    values = [hyper[key] if index is None else hyper[key][index] for hyper in training.HYPER]
    return np.repeat(np.array(values), sizes)


def expected(name: str, workers: int, settings: dict[str, Any]) -> Iterator[Any]:
    """Yield, for each step, the parameters of each worker."""
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in training.SHAPES)])
    s = papers.Settings(
        *(workers, STEPS, vector("lr"), vector("betas", 0), vector("betas", 1), training.EPS, vector("weight_decay")),
        corrected=settings.get("bias_correction", name == "CompressedAdam"),
        tensors=tuple(slice(a, b) for a, b in pairwise(ends)),
    )
    p = torch.cat([each.view(-1) for each in training.start()]).double().numpy()
    code = {"sign": papers.sign, "ternary": papers.ternary, "int4": papers.int4}[training.CODES[name]]
    common = (p, training.gradient, papers.CompressedMean(code, workers, len(p)), s)
    own = training.SETTINGS[name]
    if name == "ZeroOneAdam":
        yield from papers.zero_one_adam(*common, papers.Intervals(*own.values()))
    elif name == "LocalSteps":
        yield from papers.diloco(*common, own["every"])
    elif name == "CompressedAdam":
        yield from ([each] * workers for each in papers.compressed_adam(*common))
    else:
        reference = {"OneBitAdam": papers.one_bit_adam, "OneBitLamb": papers.one_bit_lamb}[name]
        yield from ([each] * workers for each in reference(*common, own["freeze_step"]))


@pytest.mark.rung_c
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{name}{len(settings) or ''}" for name, settings in CASES])
def test_every_step_is_the_papers(ranks: RankPool, name: str, settings: dict[str, Any], size: int) -> None:
    trained = ranks.run(training.train, name, STEPS, settings, size=size)
    for step, wanted in enumerate(expected(name, size, settings)):
        for rank in range(size):
            got = trained[rank][step].double().numpy()
            np.testing.assert_allclose(got, wanted[rank], rtol=2e-5, atol=2e-5, err_msg=f"{step=} {rank=}")


@pytest.mark.rung_c
@pytest.mark.parametrize("name", training.CODES)
def test_ranks_hold_the_same_bits(ranks: RankPool, name: str) -> None:
    trained = ranks.run(training.train, name, STEPS, {}, size=3)
    for step in range(STEPS):
        equal = all(torch.equal(trained[rank][step], trained[0][step]) for rank in range(3))
        local = name == "LocalSteps" and (step + 1) % 3
        late = name == "ZeroOneAdam" and step + 1 in (13, 15, 17, 18, 19, 21, 22, 23)
        assert equal != bool(local or late), f"{step=}"
    assert torch.equal(trained[0][-1], trained[2][-1])  # the last step ends a round
