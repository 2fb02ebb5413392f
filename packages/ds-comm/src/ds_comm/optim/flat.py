"""Where parameters lie in flat buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Flat:
    """Places the tensors of all parameter groups one after the other, in float32.

    Args:
        groups: ``param_groups`` of an optimizer. A group's tensors lie side by side: what has one value per group is
            computed on a slice.

    Raises:
        ValueError: A parameter is sparse, not a floating-point tensor, or on another device than the first; or there
            is none at all.

    Example:
        >>> flat = Flat([{"params": [torch.ones(2), torch.ones(3)]}])
        >>> buffer = flat.new()
        >>> [view.shape for view in flat.views(buffer)]
        [torch.Size([2]), torch.Size([3])]
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        self.params: list[Tensor] = []
        self.parts: list[slice] = []  # of each group
        self.tensors: list[slice] = []  # of each parameter
        self.owners: list[int] = []  # index of the group of each parameter
        end = 0
        for index, group in enumerate(groups):
            start = end
            for param in group["params"]:
                self.tensors.append(slice(end, end := end + param.numel()))
                self.owners.append(index)
                self.params.append(param)
            self.parts.append(slice(start, end))
        if not self.params:
            raise ValueError(f"there must be a parameter in some group; got {len(self.parts)} groups without any")
        self.numel = end
        self.device = self.params[0].device
        for param in self.params:
            if param.device != self.device or not param.is_floating_point() or param.layout is not torch.strided:
                raise ValueError(
                    f"parameters must be dense floating-point tensors on one device, {self.device}; got {param.dtype}, "
                    f"{param.layout}, shape {tuple(param.shape)} on {param.device}; use one optimizer for each device"
                )

    def new(self) -> Tensor:
        """Return ``[numel]`` zeros in float32."""
        return torch.zeros(self.numel, device=self.device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return parts of ``buffer``, shaped as the parameters."""
        return [buffer[part].view(param.shape) for part, param in zip(self.tensors, self.params, strict=True)]

    def gather(self, out: Tensor) -> None:
        """Write the gradients into ``out``; a missing one is 0."""
        for param, view in zip(self.params, self.views(out), strict=True):
            grad = _dense(param.grad)
            if grad is None:
                view.zero_()
            else:
                view.copy_(grad)

    def lerp(self, out: Tensor, start: Tensor, weights: Sequence[float]) -> None:
        """Write ``start + weight * (gradient - start)`` into ``out``, each group with its weight."""
        views = zip(self.params, self.views(out), self.views(start), self.owners, strict=True)
        for param, view, old, owner in views:
            grad = _dense(param.grad)
            if grad is None:
                torch.mul(old, 1 - weights[owner], out=view)
            else:
                torch.lerp(old, grad.to(old.dtype), weights[owner], out=view)

    def copy_params(self, out: Tensor) -> None:
        """Write the parameters into ``out``."""
        for param, view in zip(self.params, self.views(out), strict=True):
            view.copy_(param)

    def place_params(self, source: Tensor) -> None:
        """Write ``source`` into the parameters that require gradients."""
        for param, view in zip(self.params, self.views(source), strict=True):
            if param.requires_grad:
                param.copy_(view)


def _dense(grad: Tensor | None) -> Tensor | None:
    if grad is not None and grad.layout is not torch.strided:
        raise ValueError(f"gradients must be dense; got {grad.layout} of shape {tuple(grad.shape)}")
    return grad
