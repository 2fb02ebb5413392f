"""Which data type each parameter computes in, and modules that stay in float32 among lower ones.

[Note: Kept modules]
Under a lower compute data type some modules (norms, a router, a recurrence) may have to stay in float32. Their
parameters and gradients do; their surroundings need not know: floating-point inputs are cast to float32 before their
forward, floating-point outputs to the compute data type after it. So such a module computes ``cast(f(x.float()))``,
and the casts are part of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .config import Precision


def compute_dtypes(model: nn.Module, precision: Precision) -> dict[nn.Parameter, torch.dtype]:
    """Return the data type of every parameter in forward and backward; kept modules get their casts.

    Raises:
        ValueError: ``precision.keep_fp32`` matches no module, or a kept parameter is shared with a module that is not.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> dtypes = compute_dtypes(model, Precision(compute=torch.bfloat16, keep_fp32=("LayerNorm",)))
        >>> dtypes[model[0].weight], dtypes[model[1].weight]
        (torch.bfloat16, torch.float32)
    """
    compute = precision.compute
    if compute is None:
        return {param: param.dtype for param in model.parameters()}
    dtypes = {param: compute if param.is_floating_point() else param.dtype for param in model.parameters()}
    if not precision.keep_fp32 or compute == torch.float32:
        return dtypes
    kept = list(outermost(model, precision.keep_fp32))
    if not kept:
        present = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(f"keep_fp32 {list(precision.keep_fp32)} match no module; classes present: {present}")
    inside = {module for part in kept for module in part.modules()}
    outside = {
        param: f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if module not in inside
        for key, param in module.named_parameters(recurse=False)
    }
    for part in kept:
        for param in part.parameters():
            if param in outside:
                raise ValueError(
                    f"parameter {outside[param]!r} is shared by a module that is kept in float32 (keep_fp32) and one "
                    "that is not: keep both, or neither"
                )
            dtypes[param] = torch.float32 if param.is_floating_point() else param.dtype
    for part in kept:
        part.register_forward_pre_hook(_widen, with_kwargs=True)
        part.register_forward_hook(_Narrow(compute))
    return dtypes


def outermost(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the modules that ``names`` match and that lie in no other such module."""
    inner: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module not in inner and (type(module).__name__ in names or not set(names).isdisjoint(path.split("."))):
            inner.update(module.modules())
            yield module


def _widen(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return _cast((args, kwargs), torch.float32)


class _Narrow:
    """Casts what a module returns."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return _cast(output, self._dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)
