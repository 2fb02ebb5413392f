"""Ranks whose configurations differ are told so, before they wait for each other."""

from __future__ import annotations

from typing import Any

import ds_core
import pytest
import torch
from ds_testkit import Rank, RankPool

BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}


def start(rank: Rank, sources: list[Any]) -> str:
    """Return what the rank is told when each has its own configuration."""
    try:
        ds_core.initialize(torch.nn.Linear(2, 2), config=sources[rank.rank], group=rank.group)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "started"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2 on rank 1, and missing on rank 0"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients is true on rank 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 on rank 1, and missing on rank 0"),
        ({"gradient_clipping": None}, "gradient_clipping is null on rank 1, and missing on rank 0"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-2}}}, 'optimizer.type is "Adam" on rank 1, and "AdamW" on'),
        ({"sparse_gradients": True}, "sparse_gradients is true on rank 1, and missing on rank 0"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2 on rank 1, and missing on rank 0"),
    ],
)
def test_the_key_is_named_on_all_ranks(ranks: RankPool, changed: dict[str, Any], said: str) -> None:
    for sources in ([BASE, BASE | changed], [BASE, BASE | changed, BASE, BASE | changed]):
        found = ranks.run(start, sources, size=len(sources))
        assert len(set(found)) == 1
        assert found[0].startswith(f"ValueError: ranks {[1, 3][: len(sources) // 2]} were given another configuration")
        assert said in found[0]


def test_what_has_no_effect_may_differ(ranks: RankPool) -> None:
    own = {"steps_per_print": 10, "tensorboard": {"enabled": False, "output_path": "a"}, "kernels": {"backend": "auto"}}
    own |= {"fp16": {}, "sparse_gradients": False}
    assert ranks.run(start, [BASE, BASE | own], size=2) == ["started", "started"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("nowhere.json", "nowhere.json"), (BASE | {"kernels": {"bakend": "cpu"}}, "unknown key kernels.bakend")],
)
def test_what_is_wrong_on_one_rank_ends_all(ranks: RankPool, wrong: Any, told: str) -> None:
    good, bad = ranks.run(start, [BASE, wrong], size=2)
    assert good.startswith("RankError: rank 1: ValueError: ")
    assert bad.startswith("ValueError: ")
    assert told in good
    assert told in bad
