"""Whether a checkpoint fits a model is decided before anything changes, with all names in one error."""

from __future__ import annotations

import pytest
import torch
from ds_core.checkpoint import check_shapes, open_checkpoint

from .checkpoint_kit import save_one

SAVED = {"param/w": torch.ones(2, 3), "buffer/mean": torch.ones(3), "exp_avg/w": torch.ones(2, 3)}
FITTING = {"w": torch.Size([2, 3]), "mean": torch.Size([3])}


@pytest.fixture
def checkpoint(tmp_path):
    save_one(tmp_path, "a", SAVED)
    return open_checkpoint(tmp_path)


def test_equal_shapes_fit_and_optimizer_state_does_not_count(checkpoint):
    check_shapes(checkpoint, FITTING)
    assert checkpoint.shapes == FITTING
    assert list(checkpoint.roles) == ["buffer", "exp_avg", "param"]


def test_all_three_kinds_of_difference_stand_in_one_error(checkpoint):
    with pytest.raises(ValueError, match="does not fit") as caught:
        check_shapes(checkpoint, {"w": torch.Size([3, 2]), "extra": torch.Size([1])})
    assert str(caught.value).splitlines() == [
        "checkpoint 'a' does not fit the model:",
        "  w: the checkpoint has shape [2, 3], the model [3, 2]",
        "  extra: not in the checkpoint, the model has shape [1]",
        "  mean: not in the model, the checkpoint has shape [3]",
    ]


def test_not_strict_allows_one_sided_tensors_but_no_other_shape(checkpoint):
    check_shapes(checkpoint, {"w": torch.Size([2, 3]), "extra": torch.Size([1])}, strict=False)
    with pytest.raises(ValueError, match=r"w: the checkpoint has shape \[2, 3\], the model \[6\]"):
        check_shapes(checkpoint, {"w": torch.Size([6])}, strict=False)


def test_a_long_list_is_cut_at_twenty_with_a_count(checkpoint):
    model = {**FITTING, **{f"layer{i}": torch.Size([1]) for i in range(50)}}
    with pytest.raises(ValueError, match="does not fit") as caught:
        check_shapes(checkpoint, model)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  ... and 30 more"
