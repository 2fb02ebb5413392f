"""Have steps in every codec, and payloads, the bits they have on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from kernel_checks import FLOATS, REFERENCE, kernel, on_host, same_bits
from outcome import NotRun
from torch import Tensor

from ds_kernels import AdamHyper, CpuBackend
from ds_kernels.backends.checks import Beside
from ds_kernels.backends.payload import DIGITS, Layout
from ds_kernels.backends.plain import state_codecs
from ds_kernels.fused import MOMENTS
from ds_kernels.hyper import AdagradHyper, LambHyper, LionHyper, SgdHyper

HOST = torch.device("cpu")
# The op, its numbers, and whether each state is a first (0) or second (1) moment.
CASES: list[tuple[str, Any, tuple[int, ...]]] = [
    ("adamw", AdamHyper(step=3, lr=1e-2, weight_decay=0.1, scale=0.3), (0, 1)),
    ("adamw", AdamHyper(step=3, lr=1e-2, weight_decay=0.1, decoupled=False, zero_grad=True), (0, 1)),
    ("lion", LionHyper(lr=1e-2, weight_decay=0.1, scale=0.3), (0,)),
    ("adagrad", AdagradHyper(step=4, lr=1e-2, lr_decay=0.1, weight_decay=0.1), (1,)),
    ("sgd", SgdHyper(lr=1e-2, weight_decay=0.1, scale=0.3), ()),
    ("sgd", SgdHyper(lr=1e-2, momentum=0.9, dampening=0.2, zero_grad=True), (0,)),
    ("sgd", SgdHyper(lr=1e-2, momentum=0.9, nesterov=True), (0,)),
    ("lamb", LambHyper(step=3, lr=1e-2, weight_decay=0.1, scale=0.5), (0, 1)),
]
_NAMES = {"adamw": ("exp_avg", "exp_avg_sq"), "lamb": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}
_NAMES |= {"adagrad": ("sum",), "sgd": ("momentum_buffer",)}


class Form(NamedTuple):
    """How the tensors of a step are stored."""

    moments: str
    split: bool
    grad: torch.dtype
    copy: torch.dtype | None


FORMS = (
    Form("fp32", split=False, grad=torch.float32, copy=torch.bfloat16),
    Form("bf16", split=True, grad=torch.bfloat16, copy=None),
    Form("int8", split=True, grad=torch.bfloat16, copy=None),
    Form("int8", split=False, grad=torch.float16, copy=torch.float16),
)


def stored(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return float32 values as a moment of ``dtype`` holds them, and the scales beside it."""
    if dtype.is_floating_point:
        return value.to(dtype), None
    codes = torch.empty(value.shape, dtype=dtype)
    scale = torch.empty(state_codecs.num_scales(value.numel()), dtype=torch.bfloat16)
    state_codecs.encode_like(value, codes, scale)
    return codes, scale


def stepped(find: Callable[[str], Callable[..., Any]], case: Any, form: Form, numel: int, device: torch.device):
    """Return all tensors after the step, always from the same values."""
    op, hyper, kinds = case
    noise = torch.randn(5, numel, generator=torch.Generator().manual_seed(numel))
    values = noise[3] * 1e-2, (noise[4] * 1e-2).square()
    param, low = state_codecs.split(noise[0]) if form.split else (noise[0].clone(), None)
    moments = [stored(values[kind], MOMENTS[form.moments][kind]) for kind in kinds]
    states = [moment.to(device) for moment, _ in moments]
    scales = {name: s.to(device) for name, (_, s) in zip(_NAMES[op], moments) if s is not None}
    grad = (noise[1] * torch.exp(3 * noise[2]) * 1e-2).to(form.grad).to(device)
    copy = None if form.copy is None else torch.zeros(numel, dtype=form.copy, device=device)
    param, low = param.to(device), None if low is None else low.to(device)
    beside = Beside(low, scales)
    results = []
    if op == "lamb":
        results = [find("coded_lamb_moments")(param, grad, *states, hyper=hyper, beside=beside)]
        find("coded_lamb_step")(param, *states, copy=copy, ratio=0.7, hyper=hyper, beside=beside)
    else:
        find(f"coded_{op}")(param, grad, *states, copy=copy, hyper=hyper, beside=beside)
    return [t for t in (*results, param, low, grad, copy, *states, *scales.values()) if t is not None]


def steps_in_every_codec_have_the_bits_of_the_cpu(device: torch.device) -> None:
    """Adam, Lion, Adagrad, SGD, LAMB; float32, bfloat16 and 8-bit states; split parameters; tails."""
    cpu: Any = CpuBackend()
    if (reason := cpu.unusable()) is not None:
        if device.type == "cpu":
            raise NotRun(f"nothing to compare with: {reason}")
        cpu = on_host()  # the plain tree, where nothing was built
    for case, form in product(CASES, FORMS[:2] if device.type == "cpu" else FORMS):
        for numel in (1, 33, 1070):
            got = stepped(lambda op: kernel("nvrtc", op, device), case, form, numel, device)
            want = stepped(lambda op: cpu.find(op, HOST, torch.float32), case, form, numel, HOST)
            assert all(map(same_bits, got, want)), (case[0], form, numel)


def long_arrays_are_stepped_to_their_ends(device: torch.device) -> None:
    """Beyond 2^31 bytes nothing wraps around: the last elements have the bits they have in a short array."""
    if device.type == "cpu":
        raise NotRun("needs a GPU")
    numel, tail = 600_000_001, 4097
    lion = kernel("nvrtc", "lion", device)
    hyper = LionHyper(lr=1e-2, weight_decay=0.1)
    ends = torch.randn(3, tail, device=device)
    whole = [torch.zeros(numel, device=device) for _ in ends]
    for tensor, end in zip(whole, ends):
        tensor[-tail:] = end
    lion(*whole, copy=None, hyper=hyper)
    lion(*ends, copy=None, hyper=hyper)
    assert all(torch.equal(tensor[-tail:], end) for tensor, end in zip(whole, ends))


def payloads_have_the_bytes_of_plain_torch(device: torch.device) -> None:
    """Every code, size of block, type of scales and of data; tails, odd addresses, what is not finite."""
    encode, decode, accumulate = (kernel("nvrtc", f"block_{op}", device) for op in ("encode", "decode", "accumulate"))
    plain = [REFERENCE.find(f"block_{op}", HOST, torch.float32) for op in ("encode", "decode", "accumulate")]
    layouts = [(code, *rest) for code in DIGITS for rest in ((64, FLOATS[0]), (256, FLOATS[2]), (1024, FLOATS[0]))]
    for layout, numel, cut in product((Layout(*row) for row in layouts), (1, 900, 70_001), (0, 1)):
        dtype = FLOATS[0] if layout.block != 256 or device.type == "cpu" else FLOATS[1]
        numel = min(numel, 5000) if device.type == "cpu" else numel
        x = (torch.randn(numel) * torch.exp(2 * torch.randn(numel))).to(dtype)[cut:]
        error, total = torch.randn(numel)[cut:], torch.randn(numel)[cut:]
        results = []
        for where, (enc, dec, acc) in ((HOST, plain), (device, (encode, decode, accumulate))):
            left, out, summed = (t.to(where, copy=True) for t in (error, torch.zeros_like(x), total))
            payload = torch.zeros(layout.payload_bytes(x.numel()) + cut, dtype=torch.uint8, device=where)[cut:]
            enc(x.to(where), left, payload, layout)
            dec(out, payload, layout)
            acc(summed, payload, layout, 1 / 3)
            results.append((payload, left, out, summed))
        assert torch.equal(results[1][0].cpu(), results[0][0]), (layout, numel, cut)
        assert all(same_bits(got, want) for got, want in zip(results[1][1:], results[0][1:])), (layout, numel, cut)


CHECKS: list[Callable[[torch.device], None]] = [
    steps_in_every_codec_have_the_bits_of_the_cpu,
    long_arrays_are_stepped_to_their_ends,
    payloads_have_the_bytes_of_plain_torch,
]
