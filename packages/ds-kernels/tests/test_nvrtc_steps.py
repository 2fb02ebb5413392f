"""The steps' GPU sources, run on the CPU: the bits of the cpu backend, in every codec, at any length and address."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from ds_kernels import AdamHyper
from ds_kernels.backends.checks import Beside
from ds_kernels.backends.nvrtc.optimizers import lamb_step
from ds_kernels.backends.plain import state_codecs
from ds_kernels.fused import MOMENTS
from ds_kernels.hyper import AdagradHyper, LambHyper, LionHyper, SgdHyper

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FIRST, SECOND = {"exp_avg": 0}, {"exp_avg": 0, "exp_avg_sq": 1}
MOMENTUM = {"momentum_buffer": 0}
NUMEL = 1070  # more than a block's elements, and no whole group or packet at the end
CASES = {
    "adamw": ("adamw", AdamHyper(step=3, lr=1e-2, weight_decay=0.1, scale=0.3), SECOND),
    "adam": ("adamw", AdamHyper(step=3, lr=1e-2, weight_decay=0.1, decoupled=False, beta1=0.3), SECOND),
    "lion": ("lion", LionHyper(lr=1e-2, weight_decay=0.1, scale=0.3), FIRST),
    "lion-from-end": ("lion", LionHyper(lr=1e-2, beta1=0.3, beta2=0.0), FIRST),
    "adagrad": ("adagrad", AdagradHyper(step=4, lr=1e-2, lr_decay=0.1, weight_decay=0.1, scale=0.3), {"sum": 1}),
    "sgd": ("sgd", SgdHyper(lr=1e-2, weight_decay=0.1, scale=0.3), {}),
    "momentum": ("sgd", SgdHyper(lr=1e-2, momentum=0.9, dampening=0.2, weight_decay=0.1), MOMENTUM),
    "first": ("sgd", SgdHyper(lr=1e-2, momentum=0.9, dampening=0.5, first=True), MOMENTUM),
    "nesterov": ("sgd", SgdHyper(lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True), MOMENTUM),
    "lamb": ("lamb", LambHyper(step=3, lr=1e-2, weight_decay=0.1, scale=0.5), SECOND),
}
cases = pytest.mark.parametrize("case", CASES)


class State:
    """The tensors of a step: float32 values as codecs store them."""

    def __init__(self, moments, numel, *, split, grad=torch.float32, copy=None, bad=()):
        generator = torch.Generator().manual_seed(numel)
        noise = torch.randn(5, numel, generator=generator)
        values = {0: noise[3] * 1e-2, 1: (noise[4] * 1e-2) ** 2}
        values[1][:64] = 0  # whole groups of zeros
        self.grad = (noise[1] * torch.exp(3 * noise[2]) * 1e-2).to(grad)
        for at, value in enumerate(bad):
            self.grad[40 + 40 * at] = value
        self.param, self.low = state_codecs.split(noise[0]) if split else (noise[0].clone(), None)
        self.states, self.scales = {}, {}
        self.copy = None if copy is None else torch.zeros(numel, dtype=copy)
        for name, (which, dtype) in moments.items():
            value = values[which]
            self.states[name] = value.clone() if dtype == torch.float32 else torch.empty(numel, dtype=dtype)
            if not dtype.is_floating_point:
                self.scales[name] = torch.empty(state_codecs.num_scales(numel), dtype=torch.bfloat16)
            state_codecs.encode_like(value, self.states[name], self.scales.get(name))

    def tensors(self):
        given = (self.param, self.low, self.grad, self.copy, *self.states.values(), *self.scales.values())
        return [tensor for tensor in given if tensor is not None]

    def take(self, part):
        """Leave out the other elements; for states without groups."""
        for name in ("param", "low", "grad", "copy"):
            tensor = vars(self)[name]
            setattr(self, name, None if tensor is None else tensor[part])
        self.states = {name: tensor[part] for name, tensor in self.states.items()}
        return self

    def run(self, backend, op, hyper):
        """Step; return all there is."""
        beside = Beside(self.low, self.scales)
        states, results = self.states.values(), []
        if op == "lamb":
            moments, step = (backend.find(f"coded_lamb_{part}", CPU, self.param.dtype) for part in ("moments", "step"))
            results.append(moments(self.param, self.grad, *states, hyper=hyper, beside=beside))
            step(self.param, *states, copy=self.copy, ratio=0.7, hyper=hyper, beside=beside)
        else:
            step = backend.find(f"coded_{op}", CPU, self.param.dtype)
            step(self.param, self.grad, *states, copy=self.copy, hyper=hyper, beside=beside)
        return [*results, *self.tensors()]


def moments_of(names, codec):
    return {name: (which, MOMENTS[codec][which]) for name, which in names.items()}


def same(got, want):
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        agree = a.contiguous().view(bits[a.itemsize]) == b.contiguous().view(bits[b.itemsize])
        assert (agree | (a.isnan() & b.isnan())).all()


@cases
@pytest.mark.parametrize("split", [False, True], ids=["float32", "split"])
def test_a_step_has_the_bits_of_the_cpu(cpu, on_host, case, split):
    op, hyper, names = CASES[case]
    # Each kernel is compiled, so not every combination: of codecs, each with its own other formats.
    forms = {"fp32": (FLOATS[0], None), "bf16": (FLOATS[1], FLOATS[1]), "int8": (FLOATS[2], FLOATS[2])}
    for codec, numel in product(forms if names else ("fp32", "int8"), (1, 33, NUMEL)):
        grad, copy = forms[codec]
        got, want = (
            State(moments_of(names, codec), numel, split=split, grad=grad, copy=copy).run(backend, op, hyper)
            for backend in (on_host, cpu)
        )
        same(got, want)


@cases
def test_misaligned_steps_have_the_same_bits(cpu, on_host, case):
    op, hyper, names = CASES[case]
    for offset in (1, 2):
        got, want = (
            State(moments_of(names, "fp32"), 300, split=False).take(slice(offset, None)).run(backend, op, hyper)
            for backend in (on_host, cpu)
        )
        same(got, want)


@cases
def test_nothing_beyond_the_end_is_written(on_host, case):
    op, hyper, names = CASES[case]
    state = State(moments_of(names, "fp32"), 64, split=False)
    memory = state.tensors()
    kept = [tensor[61:].clone() for tensor in memory]
    state.take(slice(61)).run(on_host, op, hyper)
    same([tensor[61:] for tensor in memory], kept)


@cases
def test_gradients_are_zeroed_in_the_same_pass(cpu, on_host, case):
    op, hyper, names = CASES[case]
    zeroing = type(hyper)(**{name: getattr(hyper, name) for name in hyper.__slots__} | {"zero_grad": True})
    states = [State(moments_of(names, "fp32"), 301, split=False) for _ in range(2)]
    results = [state.run(b, op, zeroing) for state, b in zip(states, (on_host, cpu))]
    same(*results)
    assert not states[0].grad.count_nonzero()


@cases
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_values_that_are_no_numbers_are_stored_as_on_the_cpu(cpu, on_host, case, codec):
    op, hyper, names = CASES[case]
    bad = (torch.nan, torch.inf, -torch.inf, 3e38, 1e-45)
    got, want = (
        State(moments_of(names, codec), 300, split=codec == "int8", grad=FLOATS[0], bad=bad).run(backend, op, hyper)
        for backend in (on_host, cpu)
    )
    same(got, want)


def test_lambs_sums_of_squares_have_the_bits_of_the_cpu_for_any_number_of_chunks(cpu, on_host):
    _, hyper, names = CASES["lamb"]
    for numel in (0, 1, 511, 512, 513, 1024, 1025, 3000):
        results = []
        for backend in (on_host, cpu):
            state = State(moments_of(names, "fp32"), numel, split=False)
            run = backend.find("lamb_moments", CPU, torch.float32)
            results.append(run(state.param, state.grad, *state.states.values(), hyper=hyper))
        same(*([result] for result in results))


def test_what_does_not_lie_on_the_device_is_named(on_host):
    tensors = [torch.zeros(12, device="meta") for _ in range(3)]
    with pytest.raises(ValueError, match=r"the backend 'nvrtc' works on tensors in host memory; got param on meta"):
        lamb_step(on_host.launcher, *tensors, ratio=1.0, hyper=LambHyper(step=1, lr=1e-3))
