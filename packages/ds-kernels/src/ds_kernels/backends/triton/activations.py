"""Activations after a bias in Triton: one pass over memory each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of, rows_and_columns

BLOCK_COLUMNS = 128
BLOCK_ROWS = 32


@triton.jit
def _forward(x, bias, out, rows, columns, has_bias: tl.constexpr, tanh: tl.constexpr, m: tl.constexpr, n: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * m + tl.arange(0, m)[:, None]
    column = tl.program_id(1) * n + tl.arange(0, n)[None, :]
    inside = (row < rows) & (column < columns)
    u = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        u += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    if tanh:
        # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y)), which needs no library and loses nothing at either end
        value = u / (1.0 + tl.exp(-2.0 * 0.7978845608028654 * (u + 0.044715 * u * u * u)))
    else:
        value = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, bias, out, sums, rows, columns,
    has_bias: tl.constexpr, tanh: tl.constexpr, m: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * m + tl.arange(0, m)[:, None]
    column = tl.program_id(1) * n + tl.arange(0, n)[None, :]
    inside = (row < rows) & (column < columns)
    at = row * columns + column
    u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        u += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    if tanh:
        twice = 2.0 * 0.7978845608028654 * (u + 0.044715 * u * u * u)
        below = 1.0 / (1.0 + tl.exp(-twice))
        above = 1.0 / (1.0 + tl.exp(twice))
        slope = below + 2.0 * u * below * above * (0.7978845608028654 * (1.0 + 0.134145 * u * u))
    else:
        slope = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    value = g * slope
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
    if has_bias:
        line = tl.sum(tl.where(inside, value, 0.0), axis=0)[None, :]
        tl.store(sums + tl.program_id(0).to(tl.int64) * columns + column, line, mask=column < columns)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Return ``gelu(x + bias)``; see :func:`ds_kernels.ops.bias_gelu`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, columns = rows_and_columns(x)
    if x.numel():
        grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
        held = x if bias is None else bias.contiguous()
        options = (bias is not None, approximate == "tanh", BLOCK_ROWS, BLOCK_COLUMNS)
        with on_device_of(x):
            _forward[grid](x, held, out, rows, columns, *options)
    return out


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``bias``; the latter is empty where there is no bias.

    The bias's gradient is summed over each 32 rows and then over those sums, always in the same order.
    """
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    rows, columns = rows_and_columns(x)
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
    sums = torch.empty(grid[0] if bias is not None else 0, columns, dtype=torch.float32, device=x.device)
    if x.numel():
        held = x if bias is None else bias.contiguous()
        options = (bias is not None, approximate == "tanh", BLOCK_ROWS, BLOCK_COLUMNS)
        with on_device_of(x):
            _backward[grid](grad, x, held, out, sums, rows, columns, *options)
    return out, x.new_empty(0) if bias is None else sums.sum(0).to(bias.dtype)


@triton.jit
def _swiglu_forward(x, bias, out, rows, columns, has_bias: tl.constexpr, m: tl.constexpr, n: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * m + tl.arange(0, m)[:, None]
    column = tl.program_id(1) * n + tl.arange(0, n)[None, :]
    inside = (row < rows) & (column < columns)
    at = 2 * row * columns + column
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + at + columns, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        gate += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        value += tl.load(bias + columns + column, mask=column < columns, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    grad, x, bias, out, sums, rows, columns, has_bias: tl.constexpr, m: tl.constexpr, n: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * m + tl.arange(0, m)[:, None]
    column = tl.program_id(1) * n + tl.arange(0, n)[None, :]
    inside = (row < rows) & (column < columns)
    at = 2 * row * columns + column
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + at + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        gate += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        value += tl.load(bias + columns + column, mask=column < columns, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = g * value * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    grad_value = g * (gate * sigmoid)
    tl.store(out + at, grad_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + columns, grad_value.to(out.dtype.element_ty), mask=inside)
    if has_bias:
        line = sums + tl.program_id(0).to(tl.int64) * 2 * columns + column
        tl.store(line, tl.sum(tl.where(inside, grad_gate, 0.0), axis=0)[None, :], mask=column < columns)
        tl.store(line + columns, tl.sum(tl.where(inside, grad_value, 0.0), axis=0)[None, :], mask=column < columns)


def bias_swiglu(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``silu(gate) * value``; see :func:`ds_kernels.ops.bias_swiglu`."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    rows, columns = rows_and_columns(out)
    if out.numel():
        grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
        held = x if bias is None else bias.contiguous()
        with on_device_of(x):
            _swiglu_forward[grid](x, held, out, rows, columns, bias is not None, BLOCK_ROWS, BLOCK_COLUMNS)
    return out


def bias_swiglu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``bias``, as :func:`bias_gelu_backward` does."""
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    rows, columns = rows_and_columns(grad)
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
    sums = torch.empty(grid[0] if bias is not None else 0, 2 * columns, dtype=torch.float32, device=x.device)
    if x.numel():
        held = x if bias is None else bias.contiguous()
        options = (bias is not None, BLOCK_ROWS, BLOCK_COLUMNS)
        with on_device_of(x):
            _swiglu_backward[grid](grad, x, held, out, sums, rows, columns, *options)
    return out, x.new_empty(0) if bias is None else sums.sum(0).to(bias.dtype)
