"""Losses that never hold the logits of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import lowered
from .checks import check_input
from .declare import Derivative, declare

_OPERANDS = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, int ignore_index, float label_smoothing, float z_loss"
)


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


# Sum over tokens: gradients come with the loss #


def _fake_sum(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted, dtype = args[-1], _sum_dtype(hidden)
    return (
        hidden.new_empty((), dtype=dtype),
        torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape if wanted[1] else 0, dtype=dtype),
        weight.new_empty(weight.shape[:1] if wanted[2] else 0, dtype=dtype),
    )


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.wanted, ctx.dtype = inputs[-1], inputs[0].dtype


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))  # without a copy in between


def _differentiate_sum(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = (
        _scaled(gradient, grad, ctx.dtype) if wanted and grad is not None else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return hidden, weight, None, bias, None, None, None, None


_linear_cross_entropy = declare(
    "linear_cross_entropy",
    f"({_OPERANDS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_sum,
    derivative=Derivative(_save_sum, _differentiate_sum),
)

# One loss for each token: the backward pass computes the logits again #


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.z_loss = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    terms = ctx.ignore_index, ctx.label_smoothing, ctx.z_loss
    gradients = _linear_cross_entropy_rows_backward(*ctx.saved_tensors, *terms, grad, wanted)
    hidden, weight, bias = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return hidden, weight, None, bias, None, None, None


def _fake_rows_backward(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    wanted: Sequence[bool] = args[-1]
    return (
        torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(weight.shape[:1] if wanted[2] else 0),
    )


_linear_cross_entropy_rows = declare(
    "linear_cross_entropy_rows",
    f"({_OPERANDS}) -> Tensor",
    fake=lambda hidden, *args: hidden.new_empty(hidden.shape[:1], dtype=_sum_dtype(hidden)),
    derivative=Derivative(_save_rows, _differentiate_rows),
)
_linear_cross_entropy_rows_backward = declare(
    "linear_cross_entropy_rows_backward",
    f"({_OPERANDS}, Tensor grad, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    fake=_fake_rows_backward,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return ``cross_entropy(linear(hidden, weight, bias), target)`` without the logits of all tokens.

    The logits of a chunk of tokens (256 to 1024) live at a time: ``chunk * vocabulary`` elements in place of several
    times ``tokens * vocabulary``. With ``sum`` and ``mean``, the forward pass computes the gradients at once and keeps
    them: those of ``weight`` and ``bias`` in float32, that of ``hidden`` in its own type. With ``none``, the backward
    pass computes the logits again, a third more work, and only the operands are kept.

    Args:
        hidden: ``[..., features]``; float32, bfloat16, float16 or float64.
        weight: ``[vocabulary, features]``, of the same data type.
        target: ``[...]``, int64: classes, or ``ignore_index``.
        bias: ``[vocabulary]``, of the same data type; None: no bias.
        ignore_index: Targets that have no loss and do not count in the mean.
        label_smoothing: Share of the target that is spread over the whole vocabulary, 0 to 1.
        z_loss: Factor on ``logsumexp(logits)**2``, added to each token's loss; keeps logits from drifting.
        reduction: ``mean`` over the tokens that count, ``sum``, or ``none``.

    Returns:
        0D, or like ``target`` for ``none``; float64 for float64 operands, else float32. The mean over no token is NaN,
        and its gradients are 0, as in torch.

    Raises:
        TypeError: If ``hidden`` is no tensor.
        ValueError: If shapes, data types, devices or settings do not fit, or a target in host memory is no class.

    Example:
        >>> hidden, weight = torch.zeros(3, 4, requires_grad=True), torch.zeros(8, 4)
        >>> linear_cross_entropy(hidden, weight, torch.tensor([1, 2, -100]))  # log(8)
        tensor(2.0794, grad_fn=<WhereBackward0>)

    Reference:
        Pin-Lun Hsu and others, Liger Kernel: Efficient Triton Kernels for LLM Training, 2024 (gradients in the forward
        pass). Erik Wijmans and others, Cut Your Losses in Large-Vocabulary Language Models, 2024 (logits computed
        again). The z-loss is that of Aakanksha Chowdhery and others, PaLM, 2022.
    """
    check_input("hidden", hidden)
    hidden, weight, bias = lowered(hidden, weight, bias)
    _check(hidden, weight, target, bias)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0 ... 1; got {label_smoothing}")
    rows, classes = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    operands = rows, weight, classes, bias, ignore_index, label_smoothing, z_loss
    if reduction == "none":
        losses: Tensor = _linear_cross_entropy_rows(*operands)
        return losses.view(target.shape)
    learns = torch.is_grad_enabled()
    wanted = [learns and tensor is not None and tensor.requires_grad for tensor in (rows, weight, bias)]
    total: Tensor = _linear_cross_entropy(*operands, wanted)[0]
    if reduction == "sum":
        return total
    count = (classes != ignore_index).sum()
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[0] == 0 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            "weight must be [vocabulary, features], and hidden [..., features]; got weight of shape "
            f"{tuple(weight.shape)} and hidden of shape {tuple(hidden.shape)}"
        )
    if target.shape != hidden.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be one torch.int64 class for each of {tuple(hidden.shape[:-1])} tokens; got {target.dtype} "
            f"of shape {tuple(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be one value for each of {weight.shape[0]} classes; got shape {tuple(bias.shape)}")
    dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) > 1 or not hidden.dtype.is_floating_point:
        raise ValueError(
            "hidden, weight and bias must be of one floating-point type; got "
            + ", ".join(sorted(map(str, dtypes)))
            + "; convert with .to()"
        )
