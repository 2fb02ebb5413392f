"""Steps of optimizers in plain torch: what they mean.

All have the same arguments: the parameter, its gradient (float32, bfloat16 or float16) and its state, a copy to
refresh from the new parameter (bfloat16 or float16, or None), the numbers of the step, and what lies beside coded
tensors (:class:`Beside`). Parameter and state are float32, or coded (``state_codecs.py``): then the step reads them as
float32 and stores its results anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import NOTHING, Beside, check_step
from . import state_codecs
from .stochastic import round_to_bfloat16
from .sums import chunk_sumsq, tree_of_rows

if TYPE_CHECKING:
    from ds_core.kernel_protocols import AdamHyper

    from ...hyper import AdagradHyper, LambHyper, LionHyper, SgdHyper

SQUARE_CHUNK = 512
"""Elements whose squares LAMB sums at a time."""


class _Values:
    """The float32 values of a step's tensors. Those of float32 tensors are the tensors themselves."""

    def __init__(self, param: Tensor, grad: Tensor, states: Mapping[str, Tensor], beside: Beside) -> None:
        self._stored = {"param": param, **states}
        self._beside = {"param": beside.low, **beside.scales}
        self._keys = beside.keys
        self._values = {
            name: state_codecs.decode(t, self._beside.get(name)).view(-1) for name, t in self._stored.items()
        }
        self.param = self._values["param"]
        self.states = [self._values[name] for name in states]
        self._grad = grad

    def scaled_grad(self, scale: float, weight_decay: float = 0.0) -> Tensor:
        grad = self._grad.view(-1).to(torch.float32) * scale
        return grad if weight_decay == 0 else grad.add_(self.param, alpha=weight_decay)

    def store(self, copy: Tensor | None, *, zero_grad: bool) -> None:
        for name, stored in self._stored.items():
            value = self._values[name].view(stored.shape)
            if name in self._keys:
                stored.copy_(round_to_bfloat16(value, self._keys[name]))
            else:
                state_codecs.encode_like(value, stored, self._beside.get(name))
        if copy is not None:
            copy.view(-1).copy_(self.param)
        if zero_grad:
            self._grad.zero_()


@torch.no_grad()
def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    copy: Tensor | None = None,
    hyper: AdamHyper,
    beside: Beside = NOTHING,
) -> None:
    """Do one Adam or AdamW step; see :meth:`ReferenceBackend.adamw`."""
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_step(param, grad, states, copy, beside)
    values = _Values(param, grad, states, beside)
    p, (m, v) = values.param, values.states
    g = values.scaled_grad(hyper.scale, 0.0 if hyper.decoupled else hyper.weight_decay)
    if hyper.decoupled:
        p.mul_(1 - hyper.lr * hyper.weight_decay)
    m.lerp_(g, 1 - hyper.beta1)
    v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
    denom = v.sqrt().div_((1 - hyper.beta2**hyper.step) ** 0.5).add_(hyper.eps)
    p.add_((m * -(hyper.lr / (1 - hyper.beta1**hyper.step))).div_(denom))
    values.store(copy, zero_grad=hyper.zero_grad)


@torch.no_grad()
def lion(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    copy: Tensor | None = None,
    hyper: LionHyper,
    beside: Beside = NOTHING,
) -> None:
    """Do one Lion step: ``p <- p (1 - lr wd) - lr sign(beta1 m + (1 - beta1) g)``, ``m <- beta2 m + (1 - beta2) g``.

    Moves 20 bytes per element in float32. Raises ValueError if the tensors do not fit.
    """
    check_step(param, grad, {"exp_avg": exp_avg}, copy, beside)
    values = _Values(param, grad, {"exp_avg": exp_avg}, beside)
    p, (m,) = values.param, values.states
    g = values.scaled_grad(hyper.scale)
    direction = m.lerp(g, 1 - hyper.beta1)
    step = torch.where(direction.isnan(), direction, direction.sign())
    p.mul_(1 - hyper.lr * hyper.weight_decay).add_(step, alpha=-hyper.lr)
    m.lerp_(g, 1 - hyper.beta2)
    values.store(copy, zero_grad=hyper.zero_grad)


@torch.no_grad()
def adagrad(
    param: Tensor,
    grad: Tensor,
    total: Tensor,
    *,
    copy: Tensor | None = None,
    hyper: AdagradHyper,
    beside: Beside = NOTHING,
) -> None:
    """Do one Adagrad step: ``g <- g + wd p``, ``s <- s + g^2``, ``p <- p - lr' g / (sqrt(s) + eps)``.

    Moves 20 bytes per element in float32. Raises ValueError if the tensors do not fit.
    """
    check_step(param, grad, {"sum": total}, copy, beside)
    values = _Values(param, grad, {"sum": total}, beside)
    p, (s,) = values.param, values.states
    g = values.scaled_grad(hyper.scale, hyper.weight_decay)
    s.addcmul_(g, g)
    p.addcdiv_(g, s.sqrt().add_(hyper.eps), value=-hyper.lr / (1 + (hyper.step - 1) * hyper.lr_decay))
    values.store(copy, zero_grad=hyper.zero_grad)


@torch.no_grad()
def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    copy: Tensor | None = None,
    hyper: SgdHyper,
    beside: Beside = NOTHING,
) -> None:
    """Do one SGD step, as ``torch.optim.SGD``: ``g <- g + wd p``, ``b <- momentum b + (1 - dampening) g``, ``p <- p -
    lr b``.

    Moves 20 bytes per element in float32, 12 without momentum. Raises ValueError if the tensors do not fit.
    """
    states = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    check_step(param, grad, states, copy, beside)
    check_momentum(momentum_buffer, hyper)
    values = _Values(param, grad, states, beside)
    g = values.scaled_grad(hyper.scale, hyper.weight_decay)
    for buffer in values.states:
        if hyper.first:
            buffer.copy_(g)
        else:
            buffer.mul_(hyper.momentum).add_(g, alpha=1 - hyper.dampening)
        g = g.add(buffer, alpha=hyper.momentum) if hyper.nesterov else buffer
    values.param.add_(g, alpha=-hyper.lr)
    values.store(copy, zero_grad=hyper.zero_grad)


def check_momentum(momentum_buffer: Tensor | None, hyper: SgdHyper) -> None:
    """Check that there is a buffer exactly where there is momentum.

    Raises:
        ValueError: If it is not so.
    """
    if (momentum_buffer is None) != (hyper.momentum == 0):
        got = "no momentum_buffer" if momentum_buffer is None else "a momentum_buffer"
        raise ValueError(
            f"momentum_buffer must be given exactly where momentum is not 0; got {got} and momentum {hyper.momentum}"
        )


@torch.no_grad()
def lamb_moments(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    hyper: LambHyper,
    beside: Beside = NOTHING,
) -> Tensor:
    """Do the first phase of a LAMB step: update the moments, measure parameter and direction.

    Each chunk of 512 elements, the last one filled up with zeros, is summed along [Note: Square tree], and so are the
    sums. Moves 24 bytes per element in float32.

    Returns:
        Two float64 numbers: the sums of squares of the parameter and of the direction.

    Raises:
        ValueError: If the tensors do not fit.
    """
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_step(param, grad, states, None, beside)
    values = _Values(param, grad, states, beside)
    m, v = values.states
    g = values.scaled_grad(hyper.scale)
    m.lerp_(g, 1 - hyper.beta1)
    v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
    direction = _lamb_direction(values.param, m, v, hyper)
    padding = -param.numel() % SQUARE_CHUNK
    padded = [torch.nn.functional.pad(x, (0, padding)) for x in (values.param, direction)]
    values.store(None, zero_grad=hyper.zero_grad)
    return sum_chunks(torch.stack([chunk_sumsq(x, SQUARE_CHUNK) for x in padded]))


@torch.no_grad()
def lamb_step(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    copy: Tensor | None = None,
    ratio: float,
    hyper: LambHyper,
    beside: Beside = NOTHING,
) -> None:
    """Do the second phase of a LAMB step: ``p <- p - lr ratio u``, with u from the moments as they are stored.

    Computing u again moves no more bytes than keeping it would, 16 per element in float32, and needs no memory.

    Raises:
        ValueError: If the tensors do not fit.
    """
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_step(param, None, states, copy, beside)
    values = _Values(param, param, states, beside)
    m, v = values.states
    values.param.add_(_lamb_direction(values.param, m, v, hyper), alpha=-hyper.lr * ratio)
    values.store(copy, zero_grad=False)


def sum_chunks(rows: Tensor) -> Tensor:
    """Add up each row along [Note: Square tree]; 0 for empty rows."""
    return tree_of_rows(rows) if rows.shape[1] else rows.new_zeros(rows.shape[0])


def _lamb_direction(p: Tensor, m: Tensor, v: Tensor, hyper: LambHyper) -> Tensor:
    denom = v.sqrt().div_((1 - hyper.beta2**hyper.step) ** 0.5).add_(hyper.eps)
    return (m / (1 - hyper.beta1**hyper.step)).div_(denom).add_(p, alpha=hyper.weight_decay)


_STEPS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "adamw": adamw,
        "lion": lion,
        "adagrad": adagrad,
        "sgd": sgd,
        "lamb_moments": lamb_moments,
        "lamb_step": lamb_step,
    }
)
KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {f"{kind}{op}": kernel for kind in ("", "coded_", "rounded_") for op, kernel in _STEPS.items()}
)
"""By name of the op; ``coded_<op>`` where a tensor is not float32, ``rounded_<op>`` where besides one is rounded
stochastically: a backend may lack either."""
