"""GPU kernels with dropout: bits and masks of plain torch, errors against float64, fresh masks in graphs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from kernel_checks import FLOATS, REFERENCE, gpu_backend, kernel, need_gpu, same_bits
from torch import Tensor


def dropout_of_nvrtc_has_the_bits_of_plain_torch(device: torch.device) -> None:
    """bias_dropout_residual, its gradient and its mask, whole packets and not."""
    forward, backward = (kernel("nvrtc", f"bias_dropout_residual{end}", device) for end in ("", "_backward"))
    for dtype, (rows, columns) in product(FLOATS, ((37, 3), (37, 260), (600, 1024))):
        x, residual, grad = torch.randn(3, rows, columns, device=device).to(dtype)
        bias, seed = torch.randn(columns, device=device).to(dtype), torch.tensor(rows, device=device)
        plain = [REFERENCE.find(f"bias_dropout_residual{end}", device, dtype) for end in ("", "_backward")]
        assert same_bits(forward(x, bias, residual, 0.3, seed), plain[0](x, bias, residual, 0.3, seed)), (
            dtype,
            columns,
        )
        got, want = (function(grad, True, 0.3, seed) for function in (backward, plain[1]))
        assert same_bits(got[0], want[0]), (dtype, columns)
        exact = want[0].double().sum(0) if dtype == torch.float32 else plain[1](grad.double(), True, 0.3, seed)[1]
        errors = [float((t.double() - exact).abs().max()) for t in (got[1], want[1])]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * float(exact.abs().max()), (dtype, columns, errors)


def softmax_of_nvrtc_is_as_exact_as_torch(device: torch.device) -> None:
    """masked_softmax_dropout and its gradient against float64, a broadcast mask, rows that see nothing, its mask."""
    ends = "", "_backward"
    for dtype, keys, causal in product(FLOATS, (67, 1028, 5000), (False, True)):
        ours, plain = (
            [find(f"masked_softmax_dropout{end}", device, dtype) for end in ends]
            for find in (gpu_backend("nvrtc", device).find, REFERENCE.find)
        )
        scores, grad = torch.randn(2, 2, 3, 5, keys, device=device).to(dtype)
        mask = torch.zeros(2, 1, 1, keys, device=device, dtype=dtype)
        mask[1] = -torch.inf
        terms = 0.5, causal, 0.25, torch.tensor(keys, device=device)
        got, theirs = (pair[0](scores, mask, *terms) for pair in (ours, plain))
        want = plain[0](scores.double(), mask.double(), *terms)
        assert same_bits((got[0] == 0).float(), (theirs[0] == 0).float()), (dtype, keys)
        grads = [pair[1](grad, theirs[1], *terms) for pair in (ours, plain)]
        right = plain[1](grad.double(), theirs[1].double(), *terms)
        _no_worse([*got, grads[0]], [*theirs, grads[1]], [*want, right])


def captured_dropout_draws_anew(device: torch.device) -> None:
    """Each replay of a graph has a mask of its own."""
    need_gpu(device)
    gpu_backend("nvrtc", device)
    from ds_kernels.ops import bias_dropout_residual

    x = torch.ones(64, 512, device=device)
    bias_dropout_residual(x, None, x, 0.5)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bias_dropout_residual(x, None, x, 0.5)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(out.clone())
    assert not torch.equal(*replays)
    assert replays[0].unique().tolist() == [1.0, 3.0]


def _no_worse(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    for a, b, c in zip(ours, theirs, exact, strict=True):
        errors = [float((t.double() - c).abs().max()) for t in (a, b)]
        room = torch.finfo(a.dtype).eps / 4 * float(c.abs().max())
        assert errors[0] <= 2 * errors[1] + room, (a.dtype, tuple(a.shape), errors)


CHECKS: list[Callable[[torch.device], None]] = [
    dropout_of_nvrtc_has_the_bits_of_plain_torch,
    softmax_of_nvrtc_is_as_exact_as_torch,
    captured_dropout_draws_anew,
]
