"""The linear map and the cross-entropy after it, one chunk of tokens at a time: the loop that all backends share.

[Note: Chunked loss]
Of the logits ``[tokens, vocabulary]`` only a chunk of rows exists at a time. For each chunk: the logits, by a product
of matrices; then one pass over them, the backend's own, which gives the losses and writes the gradient over the logits;
then the products that take this gradient to the hidden states and the weight. The weight's gradient is summed over
chunks in float32. Where the gradient that comes from above is one number for all tokens (the sum, the mean), all this
happens in the forward pass, so that no product is computed twice; where each token has its own, a second walk over the
chunks in the backward pass knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .checks import check_target

_MIN_ROWS = 256  # fewer: products of matrices slow down
_MAX_ROWS = 1024
_MAX_CLASSES = 4096  # of a low-precision part of the weight's gradient


class Terms(NamedTuple):
    """What the loss of a token is made of."""

    ignore_index: int  # targets without a loss
    label_smoothing: float  # as in torch
    z_loss: float  # factor on the square of the logarithm of the sum of exponentials


class LossPass(Protocol):
    """One pass over the logits of a chunk."""

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        terms: Terms,
        losses: Tensor,
        *,
        scales: Tensor | None,
        differentiate: bool,
    ) -> None:
        """Write the losses; and if asked, the gradient over the logits.

        Args:
            logits: ``[rows, vocabulary]``, contiguous.
            target: ``[rows]``, int64, contiguous.
            terms: What the loss is made of.
            losses: ``[rows]``, float32; float64 for float64 logits.
            scales: Factor on the gradient of each row, of the losses' type, or None: all 1.
            differentiate: False: the logits are left as they are.
        """


class _Problem(NamedTuple):
    """The arguments that the ops have in common, in their order."""

    hidden: Tensor  # [tokens, features]
    weight: Tensor  # [vocabulary, features]
    target: Tensor  # [tokens], int64
    bias: Tensor | None  # [vocabulary]
    ignore_index: int
    label_smoothing: float
    z_loss: float

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    def walk(self, run: LossPass, losses: Tensor, scales: Tensor | None, gradients: _Gradients) -> None:
        """Do all chunks, each in the same memory; see :class:`LossPass` for ``losses`` and ``scales``."""
        target, terms = self.target.contiguous(), Terms(self.ignore_index, self.label_smoothing, self.z_loss)
        check_target(target, len(self.weight), self.ignore_index)
        for rows, logits in self._chunks():
            run(
                logits,
                target[rows],
                terms,
                losses[rows],
                scales=None if scales is None else scales[rows],
                differentiate=any(gradients.wanted),
            )
            gradients.add(rows, logits)

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        tokens, features = self.hidden.shape
        # As many rows as there are features: then a chunk of logits is as large as the weight.
        size = max(1, min(tokens, max(_MIN_ROWS, min(_MAX_ROWS, features))))
        memory = self.hidden.new_empty(size, len(self.weight))
        for begin in range(0, tokens, size):
            rows = slice(begin, min(begin + size, tokens))
            logits = memory[: rows.stop - begin]
            if self.bias is None:
                torch.mm(self.hidden[rows], self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, self.hidden[rows], self.weight.t(), out=logits)
            yield rows, logits


class _Gradients:
    """Gradients of the operands, summed chunk by chunk; empty where nobody wants them."""

    def __init__(self, problem: _Problem, wanted: Sequence[bool]) -> None:
        self.wanted = wanted  # of hidden, weight and bias
        self._problem = problem
        hidden, weight, dtype = problem.hidden, problem.weight, problem.sum_dtype
        self.hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
        self.weight = weight.new_zeros(weight.shape if wanted[1] else 0, dtype=dtype)
        self.bias = weight.new_zeros(len(weight) if wanted[2] else 0, dtype=dtype)

    def add(self, rows: slice, grad: Tensor) -> None:
        """Take in the gradient of the logits of ``rows``."""
        if self.wanted[0]:
            torch.mm(grad, self._problem.weight, out=self.hidden[rows])
        if self.wanted[1]:
            hidden = self._problem.hidden[rows]
            if hidden.dtype == self.weight.dtype:
                self.weight.addmm_(grad.t(), hidden)
            else:
                for begin in range(0, len(self.weight), _MAX_CLASSES):
                    classes = slice(begin, begin + _MAX_CLASSES)
                    self.weight[classes].add_(grad[:, classes].t() @ hidden)
        if self.wanted[2]:
            self.bias.add_(grad.sum(0, dtype=self.bias.dtype))


def linear_cross_entropy(run: LossPass, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of the losses and its gradients. See [Note: Chunked loss].

    Args:
        run: The backend's pass over a chunk.
        args: The op's arguments; the last says whether the gradients of hidden, weight and bias are wanted.

    Returns:
        The sum, 0D; the gradients of hidden, in its data type, of weight and of bias, in the sum's. Those that are
        not wanted are empty.
    """
    *given, wanted = args
    problem = _Problem(*given)
    losses = problem.hidden.new_empty(len(problem.hidden), dtype=problem.sum_dtype)
    gradients = _Gradients(problem, wanted)
    problem.walk(run, losses, None, gradients)
    total = losses.sum(dtype=torch.float64).to(problem.sum_dtype)
    return total, gradients.hidden, gradients.weight, gradients.bias


def linear_cross_entropy_rows(run: LossPass, *args: Any) -> Tensor:
    """Return the loss of each token, ``[tokens]``, float32 or float64; ``args`` are the op's."""
    problem = _Problem(*args)
    losses = problem.hidden.new_empty(len(problem.hidden), dtype=problem.sum_dtype)
    problem.walk(run, losses, None, _Gradients(problem, (False, False, False)))
    return losses


def linear_cross_entropy_rows_backward(run: LossPass, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias in their own data types.

    Args:
        run: The backend's pass over a chunk.
        args: The op's arguments; the last two are the gradient of each token's loss and what is wanted.
    """
    *given, grad, wanted = args
    problem = _Problem(*given)
    gradients = _Gradients(problem, wanted)
    problem.walk(run, torch.empty_like(grad), grad.contiguous(), gradients)
    dtype = problem.weight.dtype
    return gradients.hidden, gradients.weight.to(dtype), gradients.bias.to(dtype)
