import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from mixpo.algorithms import statistics
from mixpo.algorithms.statistics import accuracy_by_gap, bootstrap_mean, wilson_interval, win_tie_lose

quick = settings(deadline=None, derandomize=True, max_examples=100)
number = st.floats(-10.0, 10.0)


def sample(size=60):
    return np.random.default_rng(3).gamma(2.0, size=size)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_agrees_with_scipy(level):
    values = sample()
    ours = bootstrap_mean(values, level=level)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", confidence_level=level, n_resamples=10_000, rng=1
    )
    standard_error = values.std() / len(values) ** 0.5
    assert ours.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-12)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * standard_error)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * standard_error)


def test_bootstrap_agrees_with_the_normal_approximation():
    values = sample(2000)
    ours = bootstrap_mean(values, resamples=4000)
    standard_error = values.std() / len(values) ** 0.5
    assert ours.low == pytest.approx(values.mean() - 1.959964 * standard_error, abs=0.15 * standard_error)
    assert ours.high == pytest.approx(values.mean() + 1.959964 * standard_error, abs=0.15 * standard_error)


def test_bootstrap_draws_the_same_from_the_same_seed():
    assert bootstrap_mean(sample(), seed=1) == bootstrap_mean(sample(), seed=1)
    assert bootstrap_mean(sample(), seed=1) != bootstrap_mean(sample(), seed=2)


def test_bootstrap_in_chunks_is_the_whole_bootstrap(monkeypatch):
    whole = bootstrap_mean(sample(), resamples=1001)
    monkeypatch.setattr(statistics, "CHUNK", 60 * 100)
    assert bootstrap_mean(sample(), resamples=1001) == whole


def test_bootstrap_takes_a_list():
    assert bootstrap_mean([1.0, 2.0, 4.0]) == bootstrap_mean(np.array([1.0, 2.0, 4.0]))


def test_one_value_has_no_bounds_and_none_no_mean():
    one = bootstrap_mean([2.5])
    assert one.mean == 2.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean([])


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (531, 1000)])
def test_wilson_agrees_with_statsmodels(successes, trials, level):
    ours = wilson_interval(successes, trials, level=level)
    low, high = proportion_confint(successes, trials, alpha=1.0 - level, method="wilson")
    assert ours.mean == pytest.approx(successes / trials, rel=1e-12)
    assert ours.low == pytest.approx(low, abs=1e-10)
    assert ours.high == pytest.approx(high, abs=1e-10)


def test_wilson_without_trials_is_refused():
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


def test_win_tie_lose_hand_example():
    one = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    other = np.array([1.0, 1.0, 3.5, 4.5, 7.0])
    assert win_tie_lose(one, other) == (0.2, 0.2, 0.6)


@quick
@given(st.lists(st.tuples(number, number), min_size=1, max_size=20))
def test_win_tie_lose_sum_to_1_and_mirror(places):
    one, other = (np.array(side) for side in zip(*places, strict=True))
    wins, ties, losses = win_tie_lose(one, other)
    assert wins + ties + losses == pytest.approx(1.0, abs=1e-12)
    assert win_tie_lose(other, one) == (losses, ties, wins)
    assert wins == sum(a > b for a, b in places) / len(places)


def test_accuracy_by_gap_hand_example():
    margins = np.array([0.0, 0.2, -0.4, 0.5, -0.5, 0.9, 3.0, -0.1])
    first, second, third, last = accuracy_by_gap(margins, [0.0, 0.5, 1.0, 3.0])
    assert (first.low, first.high, first.count, first.accuracy) == (0.0, 0.5, 4, 0.25)  # 0 counts as wrong
    assert (second.low, second.high, second.count) == (0.5, 1.0, 3)
    assert second.accuracy == pytest.approx(2 / 3, rel=1e-12)
    assert (third.count, third.accuracy, third.interval) == (0, None, None)
    assert (last.low, last.high, last.count, last.accuracy) == (3.0, math.inf, 1, 1.0)
    low, high = proportion_confint(2, 3, alpha=0.05, method="wilson")
    assert (second.interval.low, second.interval.high) == pytest.approx((low, high), abs=1e-10)


@quick
@given(st.lists(number, max_size=30), st.lists(st.floats(0.1, 9.0), max_size=5, unique=True))
def test_every_pair_is_in_exactly_one_bin(margins, edges):
    bins = accuracy_by_gap(np.array(margins, dtype=np.float64), [0.0, *sorted(edges)])
    assert len(bins) == len(edges) + 1
    assert sum(b.count for b in bins) == len(margins)
    for b in bins:
        inside = [m for m in margins if b.low <= abs(m) < b.high]
        assert b.count == len(inside)
        if inside:
            assert b.accuracy == sum(m > 0 for m in inside) / len(inside)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(Exception, match=r"shape|type"):
        win_tie_lose(np.zeros(2), np.zeros(1))
