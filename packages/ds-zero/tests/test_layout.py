"""Layouts: offsets that do not depend on the number of shards, shards that cover everything once, little padding."""

from __future__ import annotations

import torch
from ds_zero.layout import LEAF, Layout, Spec, plan
from hypothesis import given
from hypothesis import strategies as st

shapes = st.lists(st.integers(0, 40), max_size=3).map(torch.Size)
specs = st.lists(st.tuples(shapes, st.integers(0, 2)), min_size=1, max_size=12).map(
    lambda items: [Spec(f"p{index}", shape, group) for index, (shape, group) in enumerate(items)]
)


@given(specs, st.integers(1, 9))
def test_shards_hold_every_element_exactly_once(given_specs: list[Spec], num_shards: int) -> None:
    layout = plan(given_specs, num_shards)
    seen = {slot.name: torch.zeros(slot.numel, dtype=torch.int) for slot in layout.slots}
    for rank in range(num_shards):
        start, end = layout.shard_of(rank)
        assert end - start == layout.shard_numel
        for overlap in layout.overlaps(start, end):
            seen[overlap.slot.name][overlap.start : overlap.start + overlap.numel] += 1
            assert overlap.slot.offset + overlap.start == start + overlap.offset
    assert {spec.name: spec.shape.numel() for spec in given_specs} == {name: t.numel() for name, t in seen.items()}
    assert all(bool((count == 1).all()) for count in seen.values())


@given(specs, st.integers(1, 9))
def test_parameters_and_gaps_partition_the_buffer(given_specs: list[Spec], num_shards: int) -> None:
    layout = plan(given_specs, num_shards)
    covered = torch.zeros(layout.length, dtype=torch.int)
    for slot in layout.slots:
        covered[slot.offset : slot.end] += 1
    for start, end in layout.gaps():
        covered[start:end] += 1
    assert bool((covered == 1).all())
    assert layout.padding == sum(end - start for start, end in layout.gaps())


@given(specs, st.integers(1, 9))
def test_offsets_do_not_depend_on_the_number_of_shards(given_specs: list[Spec], num_shards: int) -> None:
    assert plan(given_specs, num_shards).slots == plan(given_specs, 1).slots


@given(specs, st.integers(1, 9))
def test_groups_are_contiguous(given_specs: list[Spec], num_shards: int) -> None:
    layout = plan(given_specs, num_shards)
    ranges = layout.group_ranges()
    for slot in layout.slots:
        inside = [group for group, (start, end) in ranges.items() if start <= slot.offset and slot.end <= end]
        assert slot.group in inside
        assert slot.numel == 0 or inside == [slot.group]


@given(specs, st.integers(1, 64))
def test_boundaries_respect_granules_of_the_norm(given_specs: list[Spec], num_shards: int) -> None:
    layout = plan(given_specs, num_shards)
    assert layout.granule >= LEAF
    assert layout.granule & (layout.granule - 1) == 0
    assert layout.shard_numel % layout.granule == 0


def test_padding_of_a_transformer_block_is_below_one_percent() -> None:
    dim = 512
    block = [(3 * dim, dim), (3 * dim,), (dim, dim), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    block_specs = [Spec(str(index), torch.Size(shape), 0) for index, shape in enumerate(block)]
    for num_shards in (1, 2, 4, 8, 64):
        layout: Layout = plan(block_specs, num_shards)
        assert layout.padding < 0.01 * layout.length, num_shards
