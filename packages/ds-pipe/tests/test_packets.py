"""Values travel as bytes and come back as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ds_pipe.packets import Layout, Signature, signature_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    made = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))).to(dtype)
    if draw(st.booleans()) and made.dim() == 2:
        made = made.t()
    return made.requires_grad_(dtype.is_floating_point and draw(st.booleans()))


LEAVES = tensors() | st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(value=VALUES)
def test_values_come_back(value: Any) -> None:
    signature, parts = signature_of(value)
    assert Signature.load(signature.dump()) == signature
    layout = Layout(Signature.load(signature.dump()))
    payload = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.write(parts, payload)
    back = layout.read(payload)
    assert signature_of(back)[0] == signature
    for old, new in zip(pytree.tree_leaves(value), pytree.tree_leaves(back), strict=True):
        if isinstance(old, torch.Tensor):
            assert torch.equal(old, new)
            assert old.requires_grad == new.requires_grad
        else:
            assert (type(old), old) == (type(new), new)


def test_signatures_tell_one_from_true() -> None:
    found = [signature_of(value)[0] for value in (1, 1.0, True, 0.0, -0.0, "1", None, (1,), [1])]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_what_does_not_travel() -> None:
    with pytest.raises(TypeError, match="between stages travel tensors, numbers, texts and None"):
        signature_of([torch.ones(1), object()])
