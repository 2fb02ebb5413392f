"""Units: each parameter in exactly one, blocks found, small left-overs joined."""

from __future__ import annotations

import pytest
from ds_testkit.models import seeded
from ds_zero.wrap import units_of
from torch import Tensor, nn


def names(model: nn.Module, *classes: str) -> list[str]:
    groups = units_of(model, classes)
    stored = [name for group in groups for name, _ in group.params]
    assert sorted(stored) == sorted(name for name, _ in model.named_parameters())
    return [group.name for group in groups]


def test_transformer_blocks_are_units() -> None:
    assert names(seeded(layers=2)) == ["tokens+positions", "blocks.0", "blocks.1", "norm+head"]


def test_classes_can_be_named() -> None:
    assert "blocks.0.qkv" in names(seeded(layers=2), "Linear")


def test_unknown_class_is_an_error_that_lists_the_models() -> None:
    with pytest.raises(ValueError, match=r"unit_classes \['Blok'\] name no module .* Block, Dropout"):
        units_of(seeded(), ["Blok"])


def test_tied_parameters_form_a_unit_with_both_holders() -> None:
    model = seeded(layers=2, tied=True)
    (unit,) = [group for group in units_of(model) if group.name.startswith("tokens+head")]
    assert [name for name, _ in unit.params] == ["tokens.weight"]
    assert unit.modules == [model.tokens, model.head]


def test_stages_of_blocks_are_looked_into() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    model = nn.Sequential(nn.Sequential(block(), block()), nn.Sequential(block()))
    assert names(model) == ["0.0", "0.1", "1.0"]


def test_lists_that_are_never_called_are_looked_into() -> None:
    model = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleDict({"a": nn.Linear(2, 2)})])
    assert names(model) == ["0.0", "1.a"]


class Holder(nn.Module):
    """Holds a parameter directly, around other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(Tensor([1.0]))
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * self.scale
        return out


def test_parameters_of_an_outer_module_stay_apart() -> None:
    assert names(Holder()) == ["(root)", "inner"]


def test_large_left_overs_are_not_joined() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1024, 1024), "b": nn.Linear(1024, 1024)})
    assert names(model) == ["a", "b"]
