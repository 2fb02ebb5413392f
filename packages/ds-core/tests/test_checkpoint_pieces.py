"""Intervals: cutting, intersecting, finding, and coverage."""

from __future__ import annotations

from itertools import pairwise

from ds_core.checkpoint.pieces import Interval, cut, faults, intersect, touching
from hypothesis import given, settings
from hypothesis import strategies as st

SETTINGS = settings(database=None, deadline=None, max_examples=200)
lengths = st.integers(0, 40)
bounds = st.tuples(lengths, lengths).map(sorted).map(lambda pair: Interval(*pair))


def elements(interval: Interval) -> set[int]:
    return set(range(interval.start, interval.end))


@SETTINGS
@given(bounds, bounds)
def test_intersection_holds_exactly_the_common_elements(a, b):
    assert elements(intersect(a, b)) == elements(a) & elements(b)


@SETTINGS
@given(bounds, st.integers(1, 9))
def test_cut_parts_are_bounded_and_make_up_the_whole(whole, step):
    parts = list(cut(whole, step))
    assert [i for part in parts for i in range(part.start, part.end)] == list(range(whole.start, whole.end))
    assert all(1 <= part.end - part.start <= step for part in parts)


@SETTINGS
@given(st.lists(st.integers(1, 40), unique=True, max_size=8), bounds)
def test_touching_pieces_are_those_that_share_an_element(cuts, wanted):
    edges = [0, *sorted(cuts), 41]
    tiles = [Interval(a, b) for a, b in pairwise(edges) if a < b]
    assert list(touching(tiles, wanted)) == [tile for tile in tiles if elements(tile) & elements(wanted)]


@SETTINGS
@given(st.lists(bounds, max_size=6), lengths)
def test_faults_are_the_elements_that_do_not_stand_exactly_once(pieces, numel):
    pieces = [intersect(piece, Interval(0, numel)) for piece in pieces]
    pieces = [piece for piece in pieces if piece.start < piece.end]
    counts = {i: sum(i in elements(piece) for piece in pieces) for i in range(numel)}
    found = faults(pieces, numel)
    missing = set().union(*(elements(f.interval) for f in found if f.missing))
    repeated = set().union(*(elements(f.interval) for f in found if not f.missing))
    assert missing == {i for i, count in counts.items() if count == 0}
    assert repeated == {i for i, count in counts.items() if count > 1}
