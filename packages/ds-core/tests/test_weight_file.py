"""Files of weights that are not finished leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ds_core._control import make_control
from ds_core.split_weights import SplitWeights
from ds_core.weight_file import Planned, WeightFile
from torch import nn

from .plain import PlainAccess

PLANNED = [Planned(name, torch.float32, torch.Size([3])) for name in "ab"]
NAME = "model.safetensors"


class Halt(BaseException):
    """As a keyboard's interrupt, or the end of a program."""


@pytest.mark.parametrize("error", [Halt, OSError, RuntimeError])
def test_whatever_happens_between_two_tensors_removes_the_draft(tmp_path: Path, error: type[BaseException]) -> None:
    def leave() -> None:
        with WeightFile(tmp_path, NAME, PLANNED, {}) as file:
            file.begin()
            file.write(torch.ones(3))
            assert len(list(tmp_path.iterdir())) == 1
            raise error

    with pytest.raises(error):
        leave()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_left_unfinished_is_removed(tmp_path: Path) -> None:
    with WeightFile(tmp_path, NAME, PLANNED, {}) as file:
        file.begin()
    assert not list(tmp_path.iterdir())


def test_whoever_has_not_begun_removes_nothing(tmp_path: Path) -> None:
    """Other ranks enter it, too, while the first one writes."""
    with WeightFile(tmp_path, NAME, PLANNED, {}) as file:
        file.begin()
        with WeightFile(tmp_path, NAME, PLANNED, {}) as other, pytest.raises(RuntimeError, match="is not begun"):
            other.write(torch.ones(3))
        for _ in PLANNED:
            file.write(torch.ones(3))
        file.finish()
        with pytest.raises(RuntimeError, match="is not begun, or finished"):
            file.finish()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


class Broken(PlainAccess):
    """Gives one parameter, and then an error."""

    def __init__(self, module: nn.Module, error: type[BaseException]) -> None:
        super().__init__(module)
        self.error = error
        self.given = 0

    def full_param(self, param: str) -> torch.Tensor:
        if self.given:
            raise self.error("gone")
        self.given += 1
        return super().full_param(param)


def weights_of(module: nn.Module, access: PlainAccess) -> SplitWeights:
    """Return the weights of a model of which nothing is split."""
    params = dict(module.named_parameters())
    made = SimpleNamespace(
        whole_names={name: [name] for name in params},
        whole_shapes={name: param.shape for name, param in params.items()},
        parts=lambda name: [name],
        merged=lambda _, parts: parts[0],
    )
    control = make_control(None)
    inner = SimpleNamespace(module=module, access=access)
    return SplitWeights(inner, made, control=control, data=control, group=None, device=None)


@pytest.mark.parametrize("error", [Halt, RuntimeError])
def test_a_parameter_that_cannot_be_had_leaves_no_draft(tmp_path: Path, error: type[BaseException]) -> None:
    module = nn.Linear(2, 3)
    with pytest.raises(error, match="gone"):
        weights_of(module, Broken(module, error)).save(tmp_path, name=NAME)
    assert not list(tmp_path.iterdir())
    assert weights_of(module, PlainAccess(module)).save(tmp_path, name=NAME) == {"weight": 24, "bias": 12}
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_what_cannot_be_written_is_raised_when_all_have_given_their_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Linear(2, 3)
    access, given = PlainAccess(module), []
    whole = access.full_param
    access.full_param = lambda name: (given.append(name), whole(name))[1]
    tried = []

    def write(_: WeightFile, values: torch.Tensor) -> None:
        tried.append(values)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WeightFile, "write", write)
    with pytest.raises(OSError, match="No space left"):
        weights_of(module, access).save(tmp_path, name=NAME)
    assert (given, len(tried)) == (["weight", "bias"], 1)
    assert not list(tmp_path.iterdir())
