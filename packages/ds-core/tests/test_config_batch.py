"""The batch rule: train = micro * accumulation * ranks."""

import pytest
from ds_core.config import Batch
from ds_core.config.batch import resolve
from hypothesis import given
from hypothesis import strategies as st

sizes = st.integers(1, 64)


@given(micro=sizes, accumulation=sizes, ranks=sizes)
def test_any_two_determine_the_third(micro, accumulation, ranks):
    whole = Batch(micro * accumulation * ranks, micro, accumulation)
    assert resolve(*whole, ranks=ranks) == whole
    assert resolve(None, micro, accumulation, ranks=ranks) == whole
    assert resolve(whole.train, None, accumulation, ranks=ranks) == whole
    assert resolve(whole.train, micro, None, ranks=ranks) == whole


@given(micro=sizes, ranks=sizes)
def test_one_alone_means_no_accumulation(micro, ranks):
    expected = Batch(micro * ranks, micro, 1)
    assert resolve(None, micro, None, ranks=ranks) == expected
    assert resolve(micro * ranks, None, None, ranks=ranks) == expected


maybe = st.none() | st.integers(1, 200)


@given(train=maybe, micro=maybe, accumulation=maybe, ranks=st.integers(1, 16))
def test_a_result_satisfies_the_rule_and_keeps_what_was_given(train, micro, accumulation, ranks):
    try:
        batch = resolve(train, micro, accumulation, ranks=ranks)
    except ValueError:
        # Only legitimate where no whole numbers satisfy the rule.
        candidates = [
            (m, a)
            for m in ([micro] if micro else range(1, 201))
            for a in ([accumulation] if accumulation else ([1] if not micro else range(1, 201)))
        ]
        assert (train is None and micro is None) or all(train != m * a * ranks for m, a in candidates)
    else:
        assert batch.train == batch.micro * batch.accumulation * ranks
        assert all(given in (None, got) for given, got in zip((train, micro, accumulation), batch, strict=True))


def test_a_contradiction_shows_the_product():
    with pytest.raises(ValueError, match=r"train_batch_size is 32, but .* is 4 \* 2 \* 2 = 16"):
        resolve(32, 4, 2, ranks=2)


def test_a_fraction_names_the_sizes_that_fit():
    with pytest.raises(ValueError, match=r"train_batch_size 30 must be a multiple of 8 .*; 24 and 32 are"):
        resolve(30, 4, None, ranks=2)
    with pytest.raises(ValueError, match=r"multiple of 4 \(2 accumulation steps \* 2 ranks\)"):
        resolve(30, None, 2, ranks=2)


@pytest.mark.parametrize("accumulation", [None, 4])
def test_accumulation_alone_is_not_enough(accumulation):
    with pytest.raises(ValueError, match=rf"neither train_batch_size nor .* is {accumulation}\)"):
        resolve(None, None, accumulation, ranks=2)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("size", [0, -4])
def test_sizes_are_positive(place, size):
    given = [8, 4, 2]
    given[place] = size
    with pytest.raises(ValueError, match=rf"must be a positive whole number, got {size}"):
        resolve(*given, ranks=1)
