import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from mixpo.algorithms.calibration import bin_accuracy_by_gap
from mixpo.algorithms.intervals import wilson_interval, wilson_interval_over_seeds
from mixpo.algorithms.win_rates import win_tie_loss_rates

quick = settings(deadline=None, derandomize=True, max_examples=100)
number = st.floats(-10.0, 10.0)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (531, 1000)])
def test_wilson_agrees_with_statsmodels(successes, trials, level):
    ours = wilson_interval(successes, trials, level=level)
    low, high = proportion_confint(successes, trials, alpha=1.0 - level, method="wilson")
    assert ours.mean == pytest.approx(successes / trials, rel=1e-12)
    assert ours.low == pytest.approx(low, abs=1e-10)
    assert ours.high == pytest.approx(high, abs=1e-10)


def test_wilson_stays_within_0_and_1_where_rounding_would_leave_them():
    for trials in range(1, 200):
        assert wilson_interval(0, trials).low >= 0.0
        assert wilson_interval(trials, trials).high <= 1.0


def test_wilson_without_trials_is_refused():
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


@pytest.mark.parametrize(("count", "seeds"), [(6, 2), (6, 5), (1, 3)])
def test_interval_of_share_0_or_1_is_no_narrower_than_with_one_seed(count, seeds):
    """Six of six pairs, at two seeds that judge the same six, say no more than six of six."""
    for right in (0, count):
        found = wilson_interval_over_seeds([right] * seeds, [count] * seeds)
        low, high = proportion_confint(right, count, method="wilson")
        assert (found.mean, found.low, found.high) == pytest.approx((right / count, low, high), abs=1e-10)


def test_share_interval_by_hand():
    """Shares 0.7, 0.8, 0.9 of 40: v = 0.01 / 3 between seeds beside 0.8 * 0.2 / 40 = 0.004 within one."""
    found = wilson_interval_over_seeds([28, 32, 36], [40] * 3)
    t = scipy.stats.t.ppf(0.975, 2)
    trials = 40 / (1 + t**2 * (0.01 / 3) / (1.959964**2 * 0.004))
    low, high = proportion_confint(0.8 * trials, trials, method="wilson")
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, low, high), rel=1e-5)
    unlike = wilson_interval_over_seeds([10, 45], [20, 60])  # of unlike counts: 55 of 80, not the mean of the shares
    assert unlike.mean == pytest.approx(55 / 80)
    assert unlike.low < wilson_interval(55 / 2, 40).low


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("middle", "spread"), [(0.0, 1.0), (1.5, 1.0), (3.0, 0.3), (5.0, 0.3)])
def test_share_interval_covers_at_its_level_with_few_seeds(seeds, middle, spread):
    generator = np.random.default_rng(5)

    def chances(size):
        of_seeds, of_items = generator.normal(size=(*size[:-1], 1)), generator.normal(size=(*size[:-2], 1, size[-1]))
        return 1 / (1 + np.exp(-(middle + spread * of_seeds + of_items)))

    truth = chances((40_000, 1, 1)).mean()
    drawn = (generator.random((400, seeds, 60)) < chances((400, seeds, 60))).sum(axis=2)
    found = [wilson_interval_over_seeds(row.astype(float).tolist(), [60.0] * seeds) for row in drawn]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.93
    assert all(one.low < one.high for one in found)


@quick
@given(st.lists(st.tuples(number, number), min_size=1, max_size=20))
def test_win_tie_lose_sum_to_1_and_mirror(places):
    one, other = (np.array(side) for side in zip(*places, strict=True))
    wins, ties, losses = win_tie_loss_rates(one, other)
    assert wins + ties + losses == pytest.approx(1.0, abs=1e-12)
    assert win_tie_loss_rates(other, one) == (losses, ties, wins)
    assert wins == sum(a > b for a, b in places) / len(places)


@quick
@given(st.lists(number, max_size=30), st.lists(st.floats(0.1, 9.0), max_size=5, unique=True))
def test_every_pair_is_in_exactly_one_bin(margins, edges):
    bins = bin_accuracy_by_gap(np.array(margins, dtype=np.float64), [0.0, *sorted(edges)])
    assert [b.low for b in bins] == [0.0, *sorted(edges)]
    assert [b.high for b in bins] == [*sorted(edges), math.inf]
    assert sum(b.count for b in bins) == len(margins)
    for b in bins:
        inside = [m for m in margins if b.low <= abs(m) < b.high]
        right = sum(m > 0 for m in inside)  # a margin of 0 is wrong
        assert b.count == len(inside)
        assert b.accuracy == (right / len(inside) if inside else None)
        assert b.interval == (wilson_interval(right, len(inside)) if inside else None)
