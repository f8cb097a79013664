import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from mixpo.algorithms.calibration import bin_calibration, calibration_error
from mixpo.algorithms.intervals import (
    compute_crossed_mean_interval,
    estimate_crossed_mean,
    estimate_from_variance_components,
)
from mixpo.algorithms.multiple_testing import correct_by_holm

quick = settings(deadline=None, derandomize=True, max_examples=100)
number = st.floats(-10.0, 10.0)


def crossed(generator, seeds, prompts, *, spread=1.0, noise=0.3):
    """The crossed random-effects model around 0: an effect of the seed, one of the prompt, and noise."""
    seed_effect = spread * generator.normal(size=(seeds, 1))
    prompt_effect = generator.normal(size=(1, prompts))
    return seed_effect + prompt_effect + noise * generator.normal(size=(seeds, prompts))


def sample_completions(seeds=6, prompts=15):
    return crossed(np.random.default_rng(5), seeds, prompts) + 2.0


def sizes(generator, runs, seeds, prompts, *, spread, noise):
    """How often the interval of the crossed model misses its mean, and how often p is below 0.05."""
    found = [estimate_crossed_mean(crossed(generator, seeds, prompts, spread=spread, noise=noise)) for _ in range(runs)]
    return sum(not one.low <= 0.0 <= one.high for one, _ in found) / runs, sum(p < 0.05 for _, p in found) / runs


def test_crossed_interval_agrees_with_a_loop():
    values = sample_completions()
    seeds, prompts = values.shape
    half = 0.0
    for means in (
        [math.fsum(values[s]) / prompts for s in range(seeds)],
        [math.fsum(values[:, p]) / seeds for p in range(prompts)],
    ):
        own = math.fsum(means) / len(means)
        variance = math.fsum((one - own) ** 2 for one in means) / (len(means) - 1) / len(means)
        half += scipy.stats.t.ppf(0.95, len(means) - 1) ** 2 * variance
    mean = math.fsum(values.ravel()) / values.size
    ours = compute_crossed_mean_interval(values, level=0.9)
    assert ours.mean == pytest.approx(mean, rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx((mean - half**0.5, mean + half**0.5), rel=1e-9)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shift", [0.0, 0.3, -5.0])
def test_interval_of_one_seed_or_prompt_is_students(axis, shift):
    values = sample_completions()[2] - 2.0 + shift
    ours, p = estimate_crossed_mean(np.expand_dims(values, axis))
    theirs = scipy.stats.ttest_1samp(values, 0.0)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-9)
    assert p == pytest.approx(theirs.pvalue, rel=1e-6)


@pytest.mark.parametrize(("seeds", "spread"), [(2, 4.0), (3, 4.0), (5, 4.0), (2, 0.05), (5, 0.5), (3, 0.0)])
def test_interval_covers_at_its_level_with_few_seeds(seeds, spread):
    """Where seeds differ most, percentiles of resamples missed a fifth at two seeds and a tenth at three."""
    missed, small = sizes(np.random.default_rng(9), 800, seeds, 60, spread=spread, noise=0.5)
    assert missed <= 0.07  # 5% and less, and 2.5 standard errors of so many runs
    assert small == missed


@pytest.mark.parametrize("seeds", [6, 10, 30])
def test_interval_with_many_seeds_is_close_to_the_normal_one(seeds):
    """Where seeds and prompts are all there is, the interval is as wide as one that knows the two variances."""
    generator = np.random.default_rng(8)
    widths = []
    for _ in range(300):
        found = compute_crossed_mean_interval(crossed(generator, seeds, 60, noise=0.0))
        widths.append((found.high - found.low) / 2 / (1.959964 * (1 / seeds + 1 / 60) ** 0.5))
    assert 0.9 < np.mean(widths) < {6: 1.3, 10: 1.15, 30: 1.05}[seeds]


@quick
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 10_000), st.floats(-3.0, 3.0))
def test_p_value_is_the_level_at_which_the_interval_touches_zero(seeds, prompts, drawn, shift):
    values = crossed(np.random.default_rng(drawn), seeds, prompts) + shift
    interval, p = estimate_crossed_mean(values)
    assert 0.0 < p <= 1.0
    if values.size == 1:
        assert p == 1.0
        return
    assert (p < 0.05) == (not interval.low <= 0.0 <= interval.high)
    if 1e-6 < p < 0.999:
        at = compute_crossed_mean_interval(values, level=1.0 - p)
        assert min(abs(at.low), abs(at.high)) == pytest.approx(0.0, abs=1e-6 * (at.high - at.low))
    assert estimate_crossed_mean(-values)[1] == pytest.approx(p, rel=1e-9)


def test_p_value_decreases_with_the_distance_from_zero():
    values = sample_completions() - sample_completions().mean()
    p_values = [estimate_crossed_mean(values + shift)[1] for shift in (0.0, 0.1, 0.5, 2.0, 50.0, 1e9)]
    assert p_values[0] == pytest.approx(1.0)
    assert all(one > other for one, other in itertools.pairwise(p_values))
    assert p_values[-1] > 0.0


@pytest.mark.parametrize("parts", [[(9.0, 1), (0.0, 40)], [(0.0, 40), (9.0, 1)], [(9.0, 1), (1e-30, 40)]])
def test_a_component_without_variance_changes_nothing(parts):
    interval, p = estimate_from_variance_components(10.0, parts)
    alone, p_alone = estimate_from_variance_components(10.0, [(9.0, 1)])
    assert (interval.low, p) == pytest.approx((alone.low, p_alone), rel=1e-6)
    assert p == pytest.approx(2 * scipy.stats.t.sf(10.0 / 3.0, 1), rel=1e-6)


@pytest.mark.parametrize("values", [[[2.5]], [[0.3 - 0.1] * 3, [0.2] * 3], [[0.0] * 4]])
def test_equal_values_have_nan_bounds(values):
    one, p = estimate_crossed_mean(np.array(values))
    assert one.mean == pytest.approx(values[0][0])
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert p == 1.0


def test_nan_and_empty_values_are_refused():
    values = sample_completions()
    values[1, 2] = math.nan
    with pytest.raises(ValueError, match="1 nan among 90 values"):
        compute_crossed_mean_interval(values)
    for shape in ((0, 3), (2, 0)):
        with pytest.raises(ValueError, match="among 0 values"):
            compute_crossed_mean_interval(np.zeros(shape))


@quick
@given(st.lists(st.floats(0.0, 1.0), max_size=8))
def test_holm_agrees_with_a_loop(p_values):
    expected = [
        min(1.0, max((sum(r >= q for r in p_values)) * q for q in p_values if q <= p)) for p in p_values
    ]  # q's factor: how many p-values are not below it; of equal ones the first has the most
    assert correct_by_holm(p_values) == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.nan])
def test_holm_refuses_values_outside_0_to_1(wrong):
    with pytest.raises(ValueError, match=rf"from 0 to 1, found \[{wrong}\]"):
        correct_by_holm([0.5, wrong])


def logit(confidence):
    return math.log(confidence / (1.0 - confidence))


def test_calibration_hand_example():
    margins = np.array([0.0, logit(0.6), -logit(0.62), logit(0.7), logit(0.8), 800.0, -800.0, 900.0])
    first, second, third, last = bin_calibration(margins, [0.5, 0.65, 0.82, 0.9])
    assert (first.low, first.high, first.count) == (0.5, 0.65, 3)
    assert first.predicted == pytest.approx((0.5 + 0.6 + 0.62) / 3, rel=1e-12)
    assert first.observed == pytest.approx(1.5 / 3, rel=1e-12)  # a margin of 0 counts half
    low, high = proportion_confint(1.5, 3, alpha=0.05, method="wilson")
    assert (first.interval.low, first.interval.high) == pytest.approx((low, high), abs=1e-10)
    assert first.interval.mean == first.observed
    assert (second.count, second.observed) == (2, 1.0)
    assert second.predicted == pytest.approx(0.75, rel=1e-12)
    assert (third.count, third.predicted, third.observed, third.interval) == (0, None, None, None)
    assert (last.low, last.high, last.count, last.predicted) == (0.9, 1.0, 3, 1.0)  # closed at 1
    assert last.observed == pytest.approx(2 / 3, rel=1e-12)
    expected = (3 * abs(1.72 / 3 - 0.5) + 2 * 0.25 + 3 * abs(1 - 2 / 3)) / 8
    assert calibration_error([first, second, third, last]) == pytest.approx(expected, rel=1e-12)


@quick
@given(st.lists(number, max_size=30), st.lists(st.floats(0.51, 0.99), max_size=5, unique=True))
def test_calibration_agrees_with_a_loop(margins, edges):
    bins = bin_calibration(np.array(margins, dtype=np.float64), [0.5, *sorted(edges)])
    assert len(bins) == len(edges) + 1
    assert sum(b.count for b in bins) == len(margins)
    gaps = 0.0
    for b in bins:
        sure = [float(1 / (1 + np.exp(-abs(m)))) for m in margins]
        inside = [m for m, c in zip(margins, sure, strict=True) if b.low <= c < b.high or c == b.high == 1.0]
        assert b.count == len(inside)
        if not inside:
            assert (b.predicted, b.observed, b.interval) == (None, None, None)
            continue
        predicted = math.fsum(math.exp(abs(m)) / (1 + math.exp(abs(m))) for m in inside) / len(inside)
        observed = sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in inside) / len(inside)
        assert (b.predicted, b.observed) == pytest.approx((predicted, observed), rel=1e-12)
        gaps += len(inside) / len(margins) * abs(predicted - observed)
    if margins:
        assert calibration_error(bins) == pytest.approx(gaps, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("edges", [[], [0.6], [0.5, 0.7, 0.7], [0.5, 0.8, 0.7], [0.5, 1.0], [0.0, 0.5]])
def test_calibration_edges_that_do_not_rise_from_a_half_are_refused(edges):
    with pytest.raises(ValueError, match=r"increase from 0\.5 to below 1, found"):
        bin_calibration(np.zeros(3), edges)


def test_calibration_error_without_pairs_is_refused():
    with pytest.raises(ValueError, match="1 of 2 margins are nan"):
        bin_calibration(np.array([1.0, math.nan]), [0.5])
    with pytest.raises(ValueError, match="at least one pair"):
        calibration_error(bin_calibration(np.array([]), [0.5]))
