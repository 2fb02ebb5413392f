"""What every backend asks of its arguments, so that a program that runs on one runs on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Data types that kernels read."""

GROUP = 32
"""Elements of an 8-bit state that share a scale."""

SQUARE_BLOCK = 64
"""Elements of a leaf of the tree of squares; see [Note: Square tree] in ``plain/sums.py``."""

_PLAIN_STATES = (torch.float32, torch.bfloat16)
_CODES = (torch.int8, torch.uint8)


class Beside(NamedTuple):
    """What lies beside the coded tensors of a step; see ``plain/state_codecs.py``."""

    low: Tensor | None = None  # int16, with which a bfloat16 parameter is float32
    scales: Mapping[str, Tensor] = MappingProxyType({})  # of int8 and uint8 states, under their names
    # By which bfloat16 arrays, ``param`` or states, are rounded stochastically; see plain/stochastic.py.
    keys: Mapping[str, Tensor] = MappingProxyType({})


NOTHING = Beside()
"""Beside tensors that say all by themselves."""


def check_adam(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None) -> None:
    """Check the tensors of one Adam step in float32.

    Raises:
        ValueError: If a data type, length, device or memory layout is not what the step needs.
    """
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, moment in moments.items():
        _check_dtype(name, moment, (torch.float32,))
    check_step(param, grad, moments, copy, NOTHING)


def check_step(
    param: Tensor, grad: Tensor | None, states: Mapping[str, Tensor], copy: Tensor | None, beside: Beside
) -> None:
    """Check the tensors of one step.

    Raises:
        ValueError: If a data type, length, device or memory layout is not what the step needs.
    """
    tensors = {"param": param, **states}
    if beside.low is not None and "param" in beside.keys:
        raise ValueError(
            "a bfloat16 parameter is either completed by low or rounded by keys['param']; got both; drop one"
        )
    in_float32 = beside.low is None and "param" not in beside.keys
    _check_dtype("param", param, (torch.float32 if in_float32 else torch.bfloat16,))
    for name, state in states.items():
        _check_dtype(name, state, _PLAIN_STATES if name not in beside.scales else _CODES)
    if grad is not None:
        tensors["grad"] = grad
        _check_dtype("grad", grad, FLOATS)
    if copy is not None:
        tensors["copy"] = copy
        _check_dtype("copy", copy, (torch.bfloat16, torch.float16))
    if beside.low is not None:
        tensors["low"] = beside.low
        _check_dtype("low", beside.low, (torch.int16,))
    _check_alike(tensors)
    for name, scale in beside.scales.items():
        _check_scale(name, scale, param)
    for name, key in beside.keys.items():
        _check_key(name, key, tensors)


def _check_key(name: str, key: Tensor, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors or tensors[name].dtype != torch.bfloat16:
        got = tensors[name].dtype if name in tensors else f"no array {name}"
        raise ValueError(f"keys[{name!r}] says how {name} is rounded, so it must be bfloat16; got {got}; drop the key")
    if key.dtype != torch.int64 or key.shape != (2,) or key.device.type != "cpu" or not key.is_contiguous():
        raise ValueError(
            f"keys[{name!r}] must be two contiguous int64 numbers in host memory, a key and the index of the first "
            f"element; got {key.dtype} of shape {tuple(key.shape)} on {key.device}; pass what key_of returns"
        )


def _check_scale(name: str, scale: Tensor, param: Tensor) -> None:
    _check_dtype(f"scales[{name!r}]", scale, (torch.bfloat16,))
    needed = (param.numel() + GROUP - 1) // GROUP
    if scale.numel() != needed or scale.device != param.device or not scale.is_contiguous():
        raise ValueError(
            f"scales[{name!r}] must be {needed} contiguous values on {param.device}, one for each {GROUP} elements; "
            f"got shape {tuple(scale.shape)} on {scale.device}"
        )


def check_tree_sum(out: Tensor, pieces: Sequence[Tensor]) -> None:
    """Check the tensors of a tree sum.

    Raises:
        ValueError: If there are no pieces, or data types, lengths, devices or memory do not fit.
    """
    if not pieces:
        raise ValueError("tree_sum needs at least one piece; got none")
    tensors = {"out": out} | {f"pieces[{i}]": piece for i, piece in enumerate(pieces)}
    for name, tensor in tensors.items():
        _check_dtype(name, tensor, FLOATS if name in ("out", "pieces[0]") else (pieces[0].dtype,))
    _check_alike(tensors)
    for i, piece in enumerate(pieces):
        # Exactly the same memory is fine: each element is read before it is written.
        if _overlap(out, piece) and (out.data_ptr() != piece.data_ptr() or out.dtype != piece.dtype):
            raise ValueError(
                f"out may be one of the pieces, but must not overlap one in part; out covers "
                f"{_span(out)}, pieces[{i}] {_span(piece)} as {piece.dtype}; pass a separate out"
            )


def check_chunk_sumsq(x: Tensor, chunk: int) -> None:
    """Check the arguments of a chunked sum of squares.

    Raises:
        ValueError: If the data type, layout or chunk do not fit.
    """
    _check_dtype("x", x, FLOATS)
    _check_alike({"x": x})
    if chunk < SQUARE_BLOCK or chunk % SQUARE_BLOCK:
        raise ValueError(f"chunk must be a positive multiple of {SQUARE_BLOCK}; got {chunk}")
    if x.numel() % chunk:
        raise ValueError(f"x must be whole chunks of {chunk} elements; got {x.numel()}; pad it with zeros")


def check_target(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Check that targets in host memory are classes; elsewhere that would make the device wait.

    Raises:
        ValueError: If one is not.
    """
    if target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets must be classes 0 ... {num_classes - 1} or ignore_index={ignore_index}; got {int(target[first])} "
            f"at token {first}"
        )


def check_device(backend: str, device_type: str, name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` is in memory that the kernels of ``backend`` reach.

    Raises:
        ValueError: If it is not.
    """
    if tensor.device.type != device_type:
        where = "host memory" if device_type == "cpu" else f"memory of {device_type} devices"
        raise ValueError(
            f"the backend {backend!r} works on tensors in {where}; got {name} on {tensor.device}; "
            "choose the backend 'reference' for this device"
        )


def check_cpu(name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` is in host memory; see :func:`check_device`."""
    check_device("cpu", "cpu", name, tensor)


def mark_written(*tensors: Tensor | None) -> None:
    """Tell torch of writes through raw addresses, which it does not see.

    Told of them, a backward pass that needed the old values raises instead of computing nonsense.
    """
    torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{name} must be {names}; got {tensor.dtype}; convert it with .to()")


def _check_alike(tensors: Mapping[str, Tensor]) -> None:
    first_name, first = next(iter(tensors.items()))
    numel, device = first.numel(), first.device
    for name, tensor in tensors.items():
        if tensor.numel() != numel:
            raise ValueError(
                f"all tensors must have the same number of elements; got {numel} in {first_name} and "
                f"{tensor.numel()} in {name}"
            )
        if tensor.device != device:
            raise ValueError(
                f"all tensors must be on one device; got {device} for {first_name} and {tensor.device} for "
                f"{name}; move them with .to()"
            )
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be dense and contiguous; got {tensor.layout} of shape {tuple(tensor.shape)}; "
                f"pass {name}.to_dense() or {name}.contiguous()"
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    a_begin, a_end = _span(a)
    b_begin, b_end = _span(b)
    return a.device == b.device and a_begin < b_end and b_begin < a_end


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + tensor.nbytes
