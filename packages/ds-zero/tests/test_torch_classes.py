"""What ds-zero declares of torch's optimizers is true, and leaves none out."""

from __future__ import annotations

import pytest
import torch
from ds_zero.kinds import _MATRIX, _REFUSED, _TENSOR, ELEMENTWISE


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_elementwise_ones_may_be_cut_anywhere(kind: type[torch.optim.Optimizer]) -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.Parameter(values.clone())
    parts = [torch.nn.Parameter(part.clone()) for part in values.split([4, 5])]
    generator = torch.Generator().manual_seed(1)
    steppers = [kind([whole], lr=0.05), kind(parts, lr=0.05)]  # type: ignore[call-arg]
    for _ in range(3):
        whole.grad = torch.randn(9, generator=generator)
        for part, grad in zip(parts, whole.grad.split([4, 5]), strict=True):
            part.grad = grad.clone()
        for stepper in steppers:
            stepper.step()
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole.detach())


def test_the_lists_are_disjoint_and_cover_torch() -> None:
    torchs = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    declared = [*(kind.__name__ for kind in ELEMENTWISE), *_TENSOR, *_MATRIX, *_REFUSED]
    assert len(declared) == len(set(declared))
    assert torchs <= set(declared)
