"""Norms of rows after an addition in Triton: memory is passed over once forward, backward the inputs twice.

A program takes one row, block by block of its columns, and reads it again from a cache: for the mean, for the squares
of the deviations, which does not cancel, and for the result. The gradients of weight and bias are sums over rows: a
kernel of their own goes down slabs of rows, whose few sums are added up by torch. All sums have a fixed order. The
kernels over rows are compiled for each length of row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of, rows_and_columns

LONGEST_BLOCK = 2048  # columns of a row that a program holds at a time
SLAB_ROWS = 128
TILE_ROWS = 32
TILE_COLUMNS = 128


@triton.jit
def _summed(x, residual, at, inside, has_residual: tl.constexpr):
    u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if has_residual:
        # What is normalized is what is stored.
        u += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        u = u.to(x.dtype.element_ty).to(tl.float32)
    return u


@triton.jit
def _forward(
    x, residual, weight, bias, out, total, mean, scale, eps, columns: tl.constexpr,
    has_residual: tl.constexpr, has_weight: tl.constexpr, has_bias: tl.constexpr, centered: tl.constexpr,
    n: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([n], dtype=tl.float32)
    for start in range(0, columns, n):
        column = start + tl.arange(0, n)
        inside = column < columns
        u = _summed(x, residual, row * columns + column, inside, has_residual)
        if has_residual:
            tl.store(total + row * columns + column, u.to(total.dtype.element_ty), mask=inside)
        sums += u if centered else u * u
    middle = 0.0
    squares = tl.sum(sums, axis=0)
    if centered:
        middle = squares / columns
        tl.store(mean + row, middle)
        sums = tl.zeros([n], dtype=tl.float32)
        for start in range(0, columns, n):
            column = start + tl.arange(0, n)
            inside = column < columns
            u = _summed(x, residual, row * columns + column, inside, has_residual)
            away = tl.where(inside, u - middle, 0.0)
            sums += away * away
        squares = tl.sum(sums, axis=0)
    factor = 1.0 / tl.sqrt(squares / columns + eps)
    tl.store(scale + row, factor)
    for start in range(0, columns, n):
        column = start + tl.arange(0, n)
        inside = column < columns
        y = (_summed(x, residual, row * columns + column, inside, has_residual) - middle) * factor
        if has_weight:
            y *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if has_bias:
            y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * columns + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weighted(grad, weight, at, column, inside, has_weight: tl.constexpr):
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if has_weight:
        g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return g


@triton.jit
def _backward(
    grad, grad_sum, x, weight, mean, scale, grad_x, columns: tl.constexpr,
    has_grad_sum: tl.constexpr, has_weight: tl.constexpr, centered: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + row)
    middle = 0.0
    if centered:
        middle = tl.load(mean + row)
    along = tl.zeros([n], dtype=tl.float32)
    level = tl.zeros([n], dtype=tl.float32)
    for start in range(0, columns, n):
        column = start + tl.arange(0, n)
        inside = column < columns
        g = _weighted(grad, weight, row * columns + column, column, inside, has_weight)
        u = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        along += g * ((u - middle) * factor)
        if centered:
            level += g
    along_mean = tl.sum(along, axis=0) / columns
    level_mean = tl.sum(level, axis=0) / columns
    for start in range(0, columns, n):
        column = start + tl.arange(0, n)
        inside = column < columns
        at = row * columns + column
        g = _weighted(grad, weight, at, column, inside, has_weight)
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        result = (g - level_mean - (u - middle) * factor * along_mean) * factor
        if has_grad_sum:
            result += tl.load(grad_sum + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _weights(
    grad, x, mean, scale, weight_sums, bias_sums, rows, columns,
    centered: tl.constexpr, slab: tl.constexpr, m: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * slab
    column = tl.program_id(1) * n + tl.arange(0, n)[None, :]
    weight_sum = tl.zeros([m, n], dtype=tl.float32)
    bias_sum = tl.zeros([m, n], dtype=tl.float32)
    for down in range(0, slab, m):
        row = first + down + tl.arange(0, m)[:, None]
        inside = (row < rows) & (column < columns)
        g = tl.load(grad + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        if centered:
            u -= tl.load(mean + row, mask=row < rows, other=0.0)
            bias_sum += g
        weight_sum += g * (u * tl.load(scale + row, mask=row < rows, other=0.0))
    line = tl.program_id(0).to(tl.int64) * columns + column
    tl.store(weight_sums + line, tl.sum(weight_sum, axis=0)[None, :], mask=column < columns)
    if centered:
        tl.store(bias_sums + line, tl.sum(bias_sum, axis=0)[None, :], mask=column < columns)


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalized rows, ``x + residual`` (empty without residual), and each row's mean and 1 / deviation."""
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    out, total, scale = _norm((x, residual, weight, bias), mean, eps)
    return out, total, mean, scale


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized rows, ``x + residual`` (empty without residual), and each row's 1 / root mean square."""
    return _norm((x, residual, weight, None), None, eps)


def layer_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, of the weight and of the bias; the latter two are empty without weight."""
    return _norm_backward((grad, grad_sum, x, weight), mean, scale)


def rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of the weight; the latter is empty without weight."""
    return _norm_backward((grad, grad_sum, x, weight), None, scale)[:2]


def _norm(
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None], mean: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, (residual, weight, bias) = inputs[0].contiguous(), map(_contiguous, inputs[1:])
    rows, columns = rows_and_columns(x)
    out, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rows:
        held = (x, *(x if t is None else t for t in (residual, weight, bias)), out, total)
        statistics = scale if mean is None else mean, scale
        options = residual is not None, weight is not None, bias is not None, mean is not None
        with on_device_of(x):
            _forward[(rows,)](*held, *statistics, eps, columns, *options, _block(columns))
    return out, total, scale


def _norm_backward(
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor | None], mean: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = inputs[0].contiguous(), inputs[2].contiguous()
    grad_sum, weight = _contiguous(inputs[1]), _contiguous(inputs[3])
    rows, columns = rows_and_columns(x)
    grad_x, statistics = torch.empty_like(x), (scale if mean is None else mean, scale)
    if rows:
        held = grad, x if grad_sum is None else grad_sum, x, x if weight is None else weight
        options = grad_sum is not None, weight is not None, mean is not None
        with on_device_of(x):
            _backward[(rows,)](*held, *statistics, grad_x, columns, *options, _block(columns))
    if weight is None:
        return grad_x, x.new_empty(0), x.new_empty(0)
    grid = triton.cdiv(rows, SLAB_ROWS), triton.cdiv(columns, TILE_COLUMNS)
    sums = torch.empty(2 if mean is not None else 1, grid[0], columns, dtype=torch.float32, device=x.device)
    if rows:
        tile = SLAB_ROWS, TILE_ROWS, TILE_COLUMNS
        with on_device_of(x):
            _weights[grid](grad, x, *statistics, sums[0], sums[-1], rows, columns, mean is not None, *tile)
    grad_weight, *grad_bias = sums.sum(1).to(weight.dtype)
    return grad_x, grad_weight, grad_bias[0] if grad_bias else x.new_empty(0)


def _block(columns: int) -> int:
    power: int = triton.next_power_of_2(columns)
    return min(LONGEST_BLOCK, power)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
