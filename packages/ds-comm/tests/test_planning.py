"""Plans: in time if anything is, exact if there is time, no less coded on slower links, near the least loss."""

from __future__ import annotations

import math
from itertools import product

import pytest
from ds_comm import LinkCost
from ds_comm.planning import CODES, EXACT, Bucket, Budget, Plan, plan
from hypothesis import given
from hypothesis import strategies as st

SHARES = {"exact": 1.0, "bf16": 0.5, "int8": 0.254, "int4": 0.129, "ternary": 0.0547}


@st.composite
def buckets_of(draw: st.DrawFn, max_size: int = 6) -> list[Bucket]:
    """Buffers of one level, and losses of any kind."""
    link = LinkCost(latency=draw(st.floats(0, 1e-2)), bandwidth=2.0 ** draw(st.integers(18, 34)))
    found = []
    for index in range(draw(st.integers(1, max_size))):
        exact = draw(st.integers(1, 1 << 28))
        squares = draw(st.floats(0, 1e3))
        parts = draw(st.tuples(*[st.floats(0, 1.5)] * 4))
        found.append(
            Bucket(
                name=str(index),
                link=link,
                nbytes={code: int(share * exact) + 1 for code, share in SHARES.items()},
                lost={code: squares * part for code, part in zip(CODES[1:], parts, strict=True)},
                squares=squares,
            )
        )
    return found


budgets = st.builds(
    Budget,
    target=st.floats(1e-3, 10.0),
    rest=st.floats(0, 1.0),
    coding=st.sampled_from([0.0, 1e-3, 0.5]),
    max_error=st.floats(0, 1),
)


def slower(buckets: list[Bucket], factor: float) -> list[Bucket]:
    return [
        Bucket(
            name=each.name,
            link=LinkCost(latency=each.link.latency * factor, bandwidth=each.link.bandwidth / factor),
            nbytes=each.nbytes,
            lost=each.lost,
            squares=each.squares,
        )
        for each in buckets
    ]


def possible(buckets: list[Bucket], budget: Budget) -> list[tuple[float, float]]:
    """Seconds and loss of every allowed choice."""
    allowed = [
        [EXACT]
        + [
            code
            for code, lost in each.lost.items()
            if lost <= budget.max_error * each.squares and (lost < each.squares or not lost)
        ]
        for each in buckets
    ]
    found = []
    for codes in product(*allowed):
        chosen = list(zip(buckets, codes, strict=True))
        coding = 0.0 if set(codes) == {EXACT} else budget.coding
        seconds = budget.rest + coding + sum(each.seconds(code) for each, code in chosen)
        found.append((seconds, sum(each.lost[code] for each, code in chosen if code != EXACT)))
    return found


def squares_lost(buckets: list[Bucket], found: Plan) -> float:
    return sum(each.lost[code] for each, code in zip(buckets, found.codes, strict=True) if code != EXACT)


@given(buckets_of(max_size=4), budgets)
def test_against_all_choices(buckets: list[Bucket], budget: Budget) -> None:
    found, choices = plan(buckets, budget), possible(buckets, budget)
    rounding = 1e-9 * max(seconds for seconds, _ in choices)
    fastest = min(seconds for seconds, _ in choices)
    if fastest <= budget.target - rounding:
        assert found.met
        assert found.seconds <= budget.target + rounding
        least = min(lost for seconds, lost in choices if seconds <= budget.target)
        largest = max(max(each.lost.values()) for each in buckets)
        assert squares_lost(buckets, found) <= (least + largest) * (1 + 1e-9), "no more than one step beyond the best"
    elif fastest > budget.target + rounding:
        assert not found.met
        assert found.seconds == pytest.approx(fastest, rel=1e-9)
    assert any(math.isclose(found.seconds, seconds, rel_tol=1e-9) for seconds, _ in choices), "the time is of a choice"


@given(buckets_of(), budgets)
def test_exact_if_there_is_time(buckets: list[Bucket], budget: Budget) -> None:
    exact = budget.rest + math.fsum(each.seconds(EXACT) for each in buckets)
    found = plan(buckets, budget)
    if exact <= budget.target:
        assert set(found.codes) == {EXACT}
        assert (found.error, found.nbytes) == (0.0, found.exact_nbytes)


@given(buckets_of(), budgets, st.integers(1, 12))
def test_slower_links_never_give_less_compression(buckets: list[Bucket], budget: Budget, power: int) -> None:
    fast, slow = plan(buckets, budget), plan(slower(buckets, 2.0**power), budget)
    for each, before, after in zip(buckets, fast.codes, slow.codes, strict=True):
        assert each.nbytes[after] <= each.nbytes[before]


@given(buckets_of(), budgets, st.floats(0, 1))
def test_less_time_never_gives_less_compression(buckets: list[Bucket], budget: Budget, share: float) -> None:
    less = Budget(target=share * budget.target, rest=budget.rest, coding=budget.coding, max_error=budget.max_error)
    for each, before, after in zip(buckets, plan(buckets, budget).codes, plan(buckets, less).codes, strict=True):
        assert each.nbytes[after] <= each.nbytes[before]


@given(buckets_of(), budgets)
def test_what_loses_too_much_is_never_chosen(buckets: list[Bucket], budget: Budget) -> None:
    found = plan(buckets, budget)
    for each, code in zip(buckets, found.codes, strict=True):
        if code != EXACT:
            assert each.lost[code] <= budget.max_error * each.squares
            assert each.lost[code] < each.squares or each.lost[code] == 0
    assert found.error <= budget.max_error


def test_the_slower_level_is_coded_more() -> None:
    nbytes = {code: int(share * 4e6) for code, share in SHARES.items()}
    lost = {"bf16": 1e-6, "int8": 1e-4, "int4": 0.02, "ternary": 0.2}
    within, across = (LinkCost(latency=1e-5, bandwidth=bandwidth) for bandwidth in (1e10, 1e8))
    buckets = [Bucket(name="", link=link, nbytes=nbytes, lost=lost, squares=1.0) for link in (within, across)]
    assert plan(buckets, Budget(target=0.103, rest=0.1)).codes == ("int8", "ternary")
    assert plan(buckets, Budget(target=0.111, rest=0.1)).codes == ("bf16", "int8")
    assert plan(buckets, Budget(target=0.121, rest=0.1)).codes == ("exact", "bf16")
