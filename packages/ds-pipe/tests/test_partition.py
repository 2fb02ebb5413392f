"""Cuts into stages: balanced ones against all cuts there are."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from ds_pipe.partition import balanced, uniform
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[float], int]:
    number = st.one_of(st.integers(0, 5).map(float), st.floats(0, 1e3))
    weights = draw(st.lists(number, min_size=1, max_size=9))
    return weights, draw(st.integers(1, len(weights)))


@given(cuts())
def test_the_largest_part_is_the_least_possible(case: tuple[list[float], int]) -> None:
    weights, count = case
    bounds = balanced(weights, count)
    assert bounds[0] == 0
    assert bounds[-1] == len(weights)
    assert len(bounds) == count + 1
    assert all(start < end for start, end in pairwise(bounds))

    def sums(bounds: list[int]) -> list[float]:
        return [sum(weights[start:end]) for start, end in pairwise(bounds)]

    every = [sums([0, *inner, len(weights)]) for inner in combinations(range(1, len(weights)), count - 1)]
    least = min(map(max, every))
    assert max(sums(bounds)) == pytest.approx(least)
    squares = min(sum(x * x for x in found) for found in every if max(found) <= least * (1 + 1e-12))
    assert sum(x * x for x in sums(bounds)) <= squares * (1 + 1e-9) or not any(weights)


@given(st.integers(1, 60), st.integers(1, 60))
def test_uniform_parts(num_layers: int, num_parts: int) -> None:
    if num_parts > num_layers:
        with pytest.raises(ValueError, match=f"{num_layers} layers make 1 ... {num_layers} stages; got {num_parts}"):
            uniform(num_layers, num_parts)
        return
    sizes = [end - start for start, end in pairwise(uniform(num_layers, num_parts))]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert sum(sizes) == num_layers


def test_many_layers_take_no_time() -> None:
    weights = [1.0 + index % 7 for index in range(600)]
    bounds = balanced(weights, 48)
    largest = max(sum(weights[start:end]) for start, end in pairwise(bounds))
    assert largest <= sum(weights) / 48 + 7


def test_what_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match=r"got -1.0 for layer 1"):
        balanced([1.0, -1.0], 1)
    with pytest.raises(ValueError, match="got nan for layer 0"):
        balanced([float("nan")], 1)
    with pytest.raises(ValueError, match=r"2 layers make 1 ... 2 stages; got 3"):
        balanced([1.0, 1.0], 3)
