"""The reference backend: every kernel in plain torch, on any device. It defines what the kernels mean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_adam, check_tree_sum

if TYPE_CHECKING:
    from ds_core.kernel_protocols import AdamHyper


@dataclass(frozen=True, slots=True)
class ReferenceBackend:
    """Kernels from torch operations.

    Several passes over memory and temporaries of the shard's size; meant for devices that have no backend of
    their own, for machines without a compiler, and to test other backends against.

    Example:
        >>> out = torch.empty(2)
        >>> ReferenceBackend().tree_sum(out, [torch.ones(2), torch.ones(2), torch.ones(2)])
        >>> out
        tensor([3., 3.])
    """

    @property
    def name(self) -> str:
        """``reference``."""
        return "reference"

    def unusable(self) -> str | None:
        """Return None: it runs wherever torch does."""
        return None

    def find(self, op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
        """Return the kernel of ``op``; None only for names that are no op."""
        own: dict[str, Callable[..., Any]] = {
            "adamw": self.adamw,
            "tree_sum": self.tree_sum,
            "chunk_sumsq": self.chunk_sumsq,
        }
        return own.get(op) or _families().get(op)

    def adamw(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        copy: Tensor | None,
        hyper: AdamHyper,
    ) -> None:
        """Do one Adam or AdamW step, in place, then refresh ``copy``.

        With g the gradient times ``hyper.scale``, all in float32::

            AdamW: p <- p * (1 - lr * weight_decay)        Adam: g <- g + weight_decay * p
            m <- beta1 * m + (1 - beta1) * g
            v <- beta2 * v + (1 - beta2) * g^2
            p <- p - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

        Args:
            param: Master parameter, float32.
            grad: Gradient, float32, bfloat16 or float16; left as it is unless ``hyper.zero_grad``.
            exp_avg: First moment, float32.
            exp_avg_sq: Second moment, float32.
            copy: Copy to refresh from the new parameter, bfloat16 or float16, or None.
            hyper: The numbers of the step.

        Raises:
            ValueError: If data types, lengths, devices or layouts do not fit.

        Reference:
            Ilya Loshchilov and Frank Hutter, Decoupled Weight Decay Regularization, 2019.
        """
        check_adam(param, grad, exp_avg, exp_avg_sq, copy)
        _optimizers().adamw(param, grad, exp_avg, exp_avg_sq, copy=copy, hyper=hyper)

    @torch.no_grad()
    def tree_sum(self, out: Tensor, pieces: Sequence[Tensor]) -> None:
        """Sum ``pieces`` in float32 along a binary tree over their order, rounding once into ``out``.

        Neighbours first, as a binary counter carries: ((0+1)+(2+3))+(4+5).

        Args:
            out: Where the sum goes, of any of the three types; may be one of the pieces.
            pieces: Tensors of one length and one type, float32, bfloat16 or float16.

        Raises:
            ValueError: If there are no pieces, or they do not fit each other or ``out``.
        """
        check_tree_sum(out, pieces)
        level = [piece.view(-1).to(torch.float32) for piece in pieces]
        while len(level) > 1:
            paired = [left + right for left, right in zip(level[::2], level[1::2])]
            # An odd one out waits for a partner on a higher level.
            level = paired + level[2 * len(paired) :]
        out.view(-1).copy_(level[0])

    def chunk_sumsq(self, x: Tensor, chunk: int) -> Tensor:
        """Return the float64 sums of squares of the consecutive chunks of ``x``.

        The chunk of 2c elements is exactly the sum of its two chunks of c, for every permitted c.

        The tree is that of [Note: Square tree] in ``plain/sums.py``.

        Args:
            x: Float32, bfloat16 or float16.
            chunk: Elements of a chunk, a multiple of 64 that divides the length of ``x``.

        Returns:
            1D, ``len(x) / chunk``.

        Raises:
            ValueError: If ``chunk`` or ``x`` do not fit.
        """
        result: Tensor = _sums().chunk_sumsq(x, chunk)
        return result


# Imported at the first use, so that importing the package stays cheap.


def _optimizers() -> ModuleType:
    from .plain import optimizers

    return optimizers


def _sums() -> ModuleType:
    from .plain import sums

    return sums


@functools.cache
def _families() -> Mapping[str, Callable[..., Any]]:
    from .plain import activations, codecs, dropout, linear, losses, norms, softmax

    families = (activations, codecs, dropout, linear, losses, norms, softmax, _optimizers())
    return MappingProxyType({op: kernel for family in families for op, kernel in family.KERNELS.items()})
