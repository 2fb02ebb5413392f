"""Recomputed activations: the same bits with every option, and the memory that the formula says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ds_core import ActivationCheckpointing, Checkpointer
from ds_testkit import Rank, RankPool
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

LAYERS, DIM, ROWS = 5, 24, 37  # 37 x 24 elements: two and four ranks do not divide the rows, seven not the elements

OPTIONS = [
    {"cpu_checkpointing": host, "contiguous_memory_optimization": rows, "number_checkpoints": number}
    for host, rows, number in itertools.product((False, True), (False, True), (8, 2))
]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM), nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        out: Tensor = x + self.dropout(self.down(torch.relu(self.up(x))))
        return out if mask is None else out * mask


class Stack(nn.Module):
    def __init__(self, run: Callable[..., Any] | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.run = run

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, mask=mask) if self.run is None else self.run(layer, x, mask=mask)
        return x


def gradients(run: Callable[..., Any] | None, steps: int = 3) -> list[Tensor]:
    """Losses and gradients of some steps, with dropout."""
    model = Stack(run)
    torch.manual_seed(2)
    x, mask = torch.randn(ROWS, DIM), torch.rand(ROWS, 1)
    found = []
    for _ in range(steps):
        loss = model(x, mask).square().mean()
        loss.backward()
        found += [loss.detach(), torch.rand(1)]  # the generator goes on as if nothing had been recomputed
    return found + [param.grad for param in model.parameters()]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    assert all(torch.equal(first, second) for first, second in zip(got, want, strict=True))


# Bits #


@pytest.mark.parametrize("options", OPTIONS)
def test_same_bits_with_every_option(options: dict[str, Any]) -> None:
    assert_equal(gradients(Checkpointer(ActivationCheckpointing(**options))), gradients(None))


def partitioned(rank: Rank, options: dict[str, Any]) -> tuple[list[Tensor], int]:
    run = Checkpointer(ActivationCheckpointing(partition_activations=True, **options), rank.group)
    return gradients(run), run.saved.peak


@pytest.mark.rung_c
@pytest.mark.parametrize("size", [2, 3, 4])
def test_same_bits_and_a_share_of_the_memory_where_partitioned(ranks: RankPool, size: int) -> None:
    want = gradients(None)
    share = -(-ROWS * DIM // size)
    for options in OPTIONS:
        for got, peak in ranks.run(partitioned, options, size=size):
            assert_equal(got, want)
            assert peak == LAYERS * share * 4


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """Sliced, permuted, expanded views of an activation, also empty ones and scalars."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    activation = torch.arange(float(torch.Size(shape).numel()), requires_grad=True).view(shape) * 1.0
    for dim in range(len(shape)):
        start, step = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        activation = activation[(slice(None),) * dim + (slice(start, None, step),)]
    activation = activation.permute(draw(st.permutations(range(len(shape)))))
    wide = [draw(st.integers(2, 3)) if size == 1 and draw(st.booleans()) else size for size in activation.shape]
    return activation.expand(draw(st.sampled_from([[], [3], [2, 1]])) + wide)


@given(view=views(), rows=st.booleans())
@settings(deadline=None)
def test_values_shape_and_strides_of_inputs_are_restored(view: Tensor, rows: bool) -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        meaning = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]
        seen.append((x.detach().clone(), x.shape, meaning))
        return x.exp()

    # without an option torch keeps the input as it is; a group of one keeps its own copy
    run = Checkpointer(ActivationCheckpointing(contiguous_memory_optimization=rows))
    run._stay = lambda _activations: False
    run(function, view).sum().backward()
    (first, *form), (again, *form_again) = seen
    assert torch.equal(again, first)
    assert form_again == form


def test_tensors_in_containers_are_found_and_others_pass_through() -> None:
    def function(pair: tuple[Tensor, dict[str, Any]], *, count: int) -> dict[str, Tensor]:
        x, rest = pair
        return {"out": (x * rest["deep"][0]).sin() * count + rest["mask"] + rest["index"]}

    run = Checkpointer(ActivationCheckpointing(contiguous_memory_optimization=True, number_checkpoints=3))
    leaf = torch.randn(4, requires_grad=True)
    rest = {"deep": [leaf * 3.0], "mask": torch.ones(4), "index": torch.arange(4), "none": None}
    out = run(function, (leaf * 2.0, rest), count=2)["out"]
    assert run.saved.now == 2 * 4 * 4, "what is no activation is kept by reference"
    (got,) = torch.autograd.grad(out.sum(), leaf)
    (want,) = torch.autograd.grad(function((leaf * 2.0, {**rest, "deep": [leaf * 3.0]}), count=2)["out"].sum(), leaf)
    assert torch.equal(got, want)


def test_every_function_runs_twice_and_without_gradients_once() -> None:
    model = Stack(Checkpointer())
    model(torch.randn(ROWS, DIM)).sum().backward()
    with torch.no_grad():
        model(torch.randn(ROWS, DIM))
    assert [layer.calls for layer in model.layers] == [3] * LAYERS


def test_forward_passes_may_be_ahead_of_backward_passes() -> None:
    """Rows of contiguous buffers are used again only when their graph is gone."""
    run = Checkpointer(ActivationCheckpointing(contiguous_memory_optimization=True, number_checkpoints=LAYERS))
    ahead, plain = Stack(run), Stack(None)
    for model in (ahead, plain):
        torch.manual_seed(3)
        losses = [model(torch.randn(ROWS, DIM)).square().mean() for _ in range(3)]
        for loss in (losses[1], losses[0], losses[2]):
            loss.backward()
    pairs = zip(ahead.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(first.grad, second.grad) for first, second in pairs)


# Memory #


def net_bytes(run: Callable[..., Any] | None) -> int:
    """Bytes that a forward pass allocates and does not free, as torch's allocator reports them."""
    model = Stack(run)
    x = torch.randn(ROWS, DIM)
    model(x).sum().backward()  # contiguous buffers stand
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = model(x)
    total = sum(event.self_cpu_memory_usage for event in profiler.events())
    del out
    return total


@pytest.mark.parametrize("options", OPTIONS)
def test_what_lives_from_forward_to_backward_is_the_inputs_only(options: dict[str, Any]) -> None:
    one = ROWS * DIM * 4
    run = Checkpointer(ActivationCheckpointing(**options))
    generators = LAYERS * torch.get_rng_state().nbytes
    held = net_bytes(run)
    inputs = 0 if options["contiguous_memory_optimization"] else LAYERS * one  # those buffers are allocated before
    assert held == inputs + one + generators, "inputs of layers, the output, and a generator's state for each"
    assert net_bytes(None) > LAYERS * 5 * one


@pytest.mark.parametrize("number", [2, LAYERS, 8])
def test_contiguous_buffers_are_allocated_once(number: int) -> None:
    run = Checkpointer(ActivationCheckpointing(contiguous_memory_optimization=True, number_checkpoints=number))
    model, sizes = Stack(run), []
    for _ in range(4):
        out = model(torch.randn(ROWS, DIM))
        assert run.saved.now == LAYERS * ROWS * DIM * 4
        out.sum().backward()
        assert run.saved.now == 0
        sizes.append(run.saved.buffers)
    assert set(sizes) == {-(-LAYERS // number) * number * ROWS * DIM * 4}


# Settings #


def test_a_profile_shows_both_runs() -> None:
    model = Stack(Checkpointer(ActivationCheckpointing(profile=True, synchronize_checkpoint_boundary=True)))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(torch.randn(ROWS, DIM)).sum().backward()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["ds.activations.forward"] == counts["ds.activations.recompute"] == LAYERS


def test_partitioning_needs_a_group() -> None:
    with pytest.raises(ValueError, match=r"needs the group of ranks that have the same activations; got None"):
        Checkpointer(ActivationCheckpointing(partition_activations=True))


def test_an_activation_that_is_kept_as_it_is_must_not_be_written() -> None:
    x = torch.ones(3, requires_grad=True) * 1.0
    out = Checkpointer(ActivationCheckpointing(cpu_checkpointing=True))(torch.sin, x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
