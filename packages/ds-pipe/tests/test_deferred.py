"""Weight gradients computed later have the bits of those computed at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ds_pipe.deferred import DeferredWeights
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.frozen = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 9)
        self.last = nn.Linear(9, 6, bias=False)
        self.frozen.requires_grad_(False)
        self.first.bias.requires_grad_(False)

    def forward(self, given: Tensor) -> Tensor:
        out = self.frozen(functional.gelu(self.first(self.norm(given))))
        # one weight used three times
        return self.last(out) + functional.linear(out.cos(), self.last.weight) + 0.3 * self.last(out.exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
def test_bits_are_those_of_a_whole_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model().to(dtype)
    given = torch.randn(shape, dtype=dtype)
    seen: list[int] = []
    model.last.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.numel()))
    want, found = [], []
    for grads in (want, found):
        model.zero_grad()
        for scale in (1.0, 3.0):
            entering = (given * scale).requires_grad_()
            if grads is want:
                model(entering).sum().backward()
            else:
                later = DeferredWeights()
                with later:
                    out = model(entering)
                out.sum().backward()
                later.settle()
            grads.append(entering.grad)
        grads += [p.grad for p in model.parameters()]
    assert [None if g is None else g.shape for g in found] == [None if g is None else g.shape for g in want]
    for ours, theirs in zip(found, want, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert seen == 4 * [54]  # the three uses are added up first


def test_nothing_is_put_off_where_no_input_needs_a_gradient() -> None:
    layer, later = nn.Linear(2, 1), DeferredWeights()
    with later:
        out = layer(torch.ones(3, 2))
    out.sum().backward()
    assert layer.weight.grad is not None
    with later, torch.no_grad():
        assert not layer(torch.ones(1, 2)).requires_grad


def test_what_is_to_come_at_once_is_not_put_off() -> None:
    """A weight that another stage has, and an input that serves as a weight: their gradients are sent on."""
    given, weight = torch.ones(3, 2, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    with DeferredWeights([given, weight]) as later:
        out = functional.linear(functional.linear(given, weight), weight.t())
        out = functional.linear(out, given)
    out.sum().backward()
    grads = [given.grad, weight.grad]
    assert None not in grads
    want = [grad.clone() for grad in grads]
    later.settle()
    assert all(map(torch.equal, grads, want))


class Recorded(TorchDispatchMode):
    """Notes products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.events.append("product")
        return func(*args, **(kwargs or {}))


def test_one_weight_gradient_at_a_time_last_layer_first() -> None:
    layers = [nn.Linear(3, 3) for _ in range(3)]
    recorded, later = Recorded(), DeferredWeights()
    for index, layer in enumerate(layers):
        layer.weight.register_post_accumulate_grad_hook(lambda _, index=index: recorded.events.append(f"sum {index}"))
    with later:
        out = nn.Sequential(*layers)(torch.ones(2, 3, requires_grad=True)).sum()
    out.backward()
    with recorded:
        later.settle()
    assert recorded.events == ["product", "sum 2", "product", "sum 1", "product", "sum 0"]
