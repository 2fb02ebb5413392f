"""Functions of one number: errors in units of the last place against float64, special values, bits on every set."""

from __future__ import annotations

import math

import pytest
import torch
from ds_kernels.backends.native.module import native

SQRT_HALF = math.sqrt(0.5)
FUNCTIONS = {  # number in the native module, float64 meaning, permitted units in the last place
    "exp": (0, torch.exp, 1),
    "sigmoid": (1, torch.sigmoid, 3),
    "cdf": (2, lambda x: torch.special.erfc(-x * SQRT_HALF) / 2, 6),
    "pdf": (3, lambda x: torch.exp(-x * x / 2) / math.sqrt(2 * math.pi), 3),
}
SMALLEST_NORMAL, TINIEST = 2.0**-126, 2.0**-149
EXP_LIMIT = math.exp(88.37)


def evaluate(backend, name, x, *, fine=True):
    out = torch.full_like(x, torch.nan)
    native(backend.isa).math(FUNCTIONS[name][0], fine, x.data_ptr(), out.data_ptr(), x.numel())
    return out


def every_kind_of_number():
    """All signs, exponents and leading mantissas, and a dense grid where the functions change."""
    bits = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) | 0x1234
    spread = bits.view(torch.float32)
    return torch.cat([spread[spread.isfinite()], torch.linspace(-110, 95, 400_001), torch.linspace(-15, 7, 400_001)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_is_a_few_units_in_the_last_place(cpu, name):
    _, exact, permitted = FUNCTIONS[name]
    x = every_kind_of_number()
    expected = exact(x.double())
    ours = evaluate(cpu, name, x)
    unit = torch.exp2(expected.abs().log2().floor() - 23)
    assert (ours[expected >= 2.0**128] == torch.inf).all()
    assert (ours[expected < SMALLEST_NORMAL] <= SMALLEST_NORMAL).all()
    counted = (expected >= SMALLEST_NORMAL) & (expected < EXP_LIMIT)
    error = ((ours.double() - expected).abs() / unit)[counted]
    assert error.max() <= permitted, f"{error.max()} at {x[counted][error.argmax()]}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_shorter_computation_is_exact_enough_for_halves(cpu, name):
    x = every_kind_of_number()
    expected = FUNCTIONS[name][1](x.double())
    counted = (expected >= SMALLEST_NORMAL) & (expected < EXP_LIMIT)
    error = ((evaluate(cpu, name, x, fine=False).double() - expected).abs() / expected)[counted]
    assert error.max() <= 2e-5, f"{error.max()} at {x[counted][error.argmax()]}"


def test_limits_and_nan(cpu_isas):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, TINIEST, -TINIEST])
    expected = {
        "exp": [torch.inf, 0, torch.nan, 1, 1, 1, 1],
        "sigmoid": [1, 0, torch.nan, 0.5, 0.5, 0.5, 0.5],
        "cdf": [1, 0, torch.nan, 0.5, 0.5, 0.5, 0.5],
        "pdf": [0, 0, torch.nan, *4 * [1 / math.sqrt(2 * math.pi)]],
    }
    for backend in cpu_isas:
        for name, values in expected.items():
            for fine, error in ((True, 2e-7), (False, 2e-5)):
                torch.testing.assert_close(
                    evaluate(backend, name, x, fine=fine), torch.tensor(values), rtol=error, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_instruction_set_gives_the_same_bits(cpu_isas, name):
    x = every_kind_of_number()[::7]
    for fine in (True, False):
        first, *others = [evaluate(backend, name, x, fine=fine) for backend in cpu_isas]
        assert all(torch.equal(other, first) for other in others)
