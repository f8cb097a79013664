import math
import random
import tracemalloc

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from mixpo.algorithms import statistics
from mixpo.algorithms.statistics import (
    bootstrap_mean,
    calibration,
    calibration_error,
    crossed_interval,
    degrees_of_freedom,
    holm,
    percentile_interval,
    resampled_means,
    two_sided_p,
    value_at,
)

quick = settings(deadline=None, derandomize=True, max_examples=100)
number = st.floats(-10.0, 10.0)


def crossed(generator, seeds, prompts, *, spread=1.0, noise=0.3):
    """The crossed random-effects model around 0: an effect of the seed, one of the prompt, and noise."""
    seed_effect = spread * generator.normal(size=(seeds, 1))
    prompt_effect = generator.normal(size=(1, prompts))
    return seed_effect + prompt_effect + noise * generator.normal(size=(seeds, prompts))


def sample(seeds=6, prompts=15):
    return crossed(np.random.default_rng(5), seeds, prompts) + 2.0


def test_crossed_interval_agrees_with_a_loop():
    values = sample()
    seeds, prompts = values.shape
    draw = random.Random(11)
    loop = []
    for _ in range(6000):
        drawn_seeds = draw.choices(range(seeds), k=seeds - 1)
        drawn_prompts = draw.choices(range(prompts), k=prompts)
        loop.append(values[np.ix_(drawn_seeds, drawn_prompts)].mean())
    ours = percentile_interval(0.0, resampled_means(values[None], resamples=20_000)[0], level=0.9)
    assert ours.low == pytest.approx(np.percentile(loop, 5), abs=0.1 * np.std(loop))
    assert ours.high == pytest.approx(np.percentile(loop, 95), abs=0.1 * np.std(loop))
    expanded = crossed_interval(values, resamples=20_000, level=0.9)
    assert expanded.mean == pytest.approx(math.fsum(values.ravel()) / values.size, rel=1e-12)
    assert expanded.low < ours.low < ours.high < expanded.high


def test_five_seeds_cover_what_five_seeds_can():
    generator = np.random.default_rng(9)
    intervals = [crossed_interval(crossed(generator, 5, 40), seed=run, resamples=600) for run in range(400)]
    assert 0.91 <= sum(one.low <= 0.0 <= one.high for one in intervals) / 400 <= 0.98


def test_degrees_of_freedom_are_of_what_varies():
    seeds_only, prompts_only = np.arange(5.0)[:, None] * np.ones(60), np.ones((5, 1)) * np.arange(60.0)
    assert degrees_of_freedom(seeds_only) == pytest.approx(4)
    assert degrees_of_freedom(prompts_only) == pytest.approx(59)
    assert degrees_of_freedom(np.ones((5, 60))) == math.inf
    by_seed, by_prompt = sample().mean(axis=1), sample().mean(axis=0)
    one, other = scipy.stats.sem(by_seed) ** 2, scipy.stats.sem(by_prompt) ** 2
    expected = (one + other) ** 2 / (one**2 / 5 + other**2 / 14)
    assert degrees_of_freedom(sample()) == pytest.approx(expected)


@pytest.mark.parametrize("df", [3.0, 8.0, math.inf])
def test_the_interval_excludes_zero_where_p_is_small(df):
    means = np.random.default_rng(3).normal(1.0, 0.4, size=20_000)
    for shift in np.linspace(-0.5, 0.5, 21):
        interval = percentile_interval(1.0 + shift, means + shift, df=df)
        p = two_sided_p(means + shift, df=df)
        assert (interval.low > 0) == (p < 0.05) or abs(p - 0.05) < 0.002
    student = 2 * scipy.stats.t.sf(1.0 / 0.4, df) if df < math.inf else 2 * scipy.stats.norm.sf(1.0 / 0.4)
    assert two_sided_p(means, df=df) == pytest.approx(student, rel=0.15)


@pytest.mark.parametrize(
    ("seeds", "prompts", "noise"), [(6, 15, 0.3), (15, 6, 0.3), (4, 5, 4.0), (1, 12, 1.0), (9, 1, 1.0)]
)
def test_resamples_have_the_variance_of_the_crossed_bootstrap(seeds, prompts, noise):
    values = crossed(np.random.default_rng(6), seeds, prompts, noise=noise)
    mean = values.mean()
    by_seed, by_prompt = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - by_seed[:, None] - by_prompt[None]
    # Shares of a multinomial draw of n from S have covariance (1[s = s'] - 1 / S) / (S n); each part sums to 0 along
    # its axes.
    seed_pairs, prompt_pairs = seeds * max(1, seeds - 1), prompts**2
    variance = (by_seed**2).sum() / seed_pairs + (by_prompt**2).sum() / prompt_pairs
    variance += (rest**2).sum() / (seed_pairs * prompt_pairs)
    means = resampled_means(values[None], resamples=40_000)[0]
    assert means.var() == pytest.approx(variance, rel=0.05)
    assert means.mean() == pytest.approx(mean, abs=5 * (variance / 40_000) ** 0.5)


def test_crossed_interval_covers_the_mean_of_the_crossed_model():
    generator = np.random.default_rng(7)
    covered = of_prompts_only = 0
    runs = 400
    for run in range(runs):
        values = crossed(generator, 30, 40)
        both = crossed_interval(values, seed=run, resamples=600)
        prompts_only = bootstrap_mean(values.mean(axis=0), seed=run, resamples=600)
        covered += both.low <= 0.0 <= both.high
        of_prompts_only += prompts_only.low <= 0.0 <= prompts_only.high
    assert 0.91 <= covered / runs <= 0.98
    assert of_prompts_only / runs < 0.88  # what forgetting the seeds would claim


@pytest.mark.parametrize("axis", [0, 1])
def test_a_single_seed_or_prompt_leaves_the_plain_bootstrap(axis):
    values = sample(60, 60)[0]
    ours = crossed_interval(np.expand_dims(values, axis))
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    standard_error = values.std() / len(values) ** 0.5
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * standard_error)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * standard_error)
    assert ours.mean == pytest.approx(bootstrap_mean(values).mean, rel=1e-12)


def test_items_share_their_draws():
    one, other = sample(), crossed(np.random.default_rng(8), 6, 15)
    means = resampled_means(np.stack([one, one, one - 3.0, other, one - other]), resamples=500)
    assert means.shape == (5, 500)
    assert means[0].std() > 0.1
    np.testing.assert_allclose(means[1], means[0], rtol=1e-12)
    np.testing.assert_allclose(means[2], means[0] - 3.0, atol=1e-12)
    np.testing.assert_allclose(means[4], means[0] - means[3], atol=1e-12)
    np.testing.assert_allclose(resampled_means(other[None], resamples=500)[0], means[3], atol=1e-12)


def test_seeds_and_prompts_are_drawn_apart():
    square = np.eye(12)  # drawn together, seed i whenever prompt i, the mean would be that of squared counts
    means = resampled_means(square[None], resamples=20_000)[0]
    assert means.mean() == pytest.approx(1 / 12, rel=0.02)


def test_resamples_of_outcomes_that_agree_are_exactly_alike():
    values = np.full((1, 5, 7), 0.5)
    assert (resampled_means(values, resamples=100) == 0.5).all()
    assert (resampled_means(0 * values, resamples=100) == 0.0).all()


def test_resamples_in_chunks_are_the_whole(monkeypatch):
    values = np.stack([sample(), -sample()])
    whole = resampled_means(values, resamples=1001)
    monkeypatch.setattr(statistics, "CHUNK", 15 * 100)
    np.testing.assert_allclose(resampled_means(values, resamples=1001), whole, rtol=1e-12)
    monkeypatch.setattr(statistics, "CHUNK", 1)
    np.testing.assert_allclose(resampled_means(values, resamples=1001), whole, rtol=1e-12)
    assert len(np.unique(whole[0])) > 990


@pytest.mark.parametrize("shape", [(2, 5, 1000), (20, 50, 10), (1, 1000, 10)])
def test_resampling_holds_little_at_once(monkeypatch, shape):
    monkeypatch.setattr(statistics, "CHUNK", 10_000)
    values = np.ones(shape)
    tracemalloc.start()
    resampled_means(values, resamples=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000  # 2 MB of draws are kept; at once it would be more than 8 MB


def test_resamples_are_the_same_from_the_same_seed():
    values = sample()[None]
    assert (resampled_means(values, seed=1, resamples=50) == resampled_means(values, seed=1, resamples=50)).all()
    assert (resampled_means(values, seed=1, resamples=50) != resampled_means(values, seed=2, resamples=50)).any()


@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
def test_resampling_nothing_is_refused(shape):
    with pytest.raises(ValueError, match="at least one value, found"):
        resampled_means(np.zeros(shape))


def test_no_resamples_are_refused():
    with pytest.raises(ValueError, match="at least one resample, found 0"):
        resampled_means(np.zeros((1, 2, 3)), resamples=0)


def test_one_value_has_no_bounds():
    one = crossed_interval(np.array([[2.5]]))
    assert one.mean == 2.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_percentile_interval_hand_example():
    interval = percentile_interval(47.0, np.random.default_rng(0).permutation(101).astype(np.float64), level=0.9)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((47.0, 5.0, 95.0), rel=1e-12)


@pytest.mark.parametrize("function", [lambda means: percentile_interval(0.0, means), two_sided_p])
def test_resamples_that_say_nothing_are_refused(function):
    with pytest.raises(ValueError, match="2 of 3 resamples are nan"):
        function(np.array([math.nan, 1.0, math.nan]))
    with pytest.raises(ValueError, match="found none"):
        function(np.array([]))


def test_a_nan_among_the_values_is_refused():
    values = sample()
    values[1, 2] = math.nan
    with pytest.raises(ValueError, match="resamples are nan"):
        crossed_interval(values, resamples=100)


def test_two_sided_p_hand_examples():
    assert two_sided_p(np.array([-1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])) == pytest.approx(4 / 8, rel=1e-12)
    assert two_sided_p(np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])) == pytest.approx(4 / 8, rel=1e-12)
    assert two_sided_p(np.ones(99)) == pytest.approx(0.02, rel=1e-12)
    assert two_sided_p(-np.ones(99)) == pytest.approx(0.02, rel=1e-12)
    assert two_sided_p(np.zeros(99)) == 1.0
    assert two_sided_p(np.array([-1.0, 1.0])) == 1.0


@quick
@given(st.lists(number, min_size=1, max_size=40), st.floats(0.0, 5.0))
def test_two_sided_p_falls_as_the_means_leave_0(means, shift):
    array = np.array(means)
    p = two_sided_p(array)
    assert 0.0 < p <= 1.0
    assert two_sided_p(-array) == p
    away = 1.0 if (array > 0).sum() >= (array < 0).sum() else -1.0
    assert two_sided_p(array + away * shift) <= p


def test_two_sided_p_is_uniform_where_the_mean_is_0():
    generator = np.random.default_rng(9)
    values = generator.normal(size=(1000, 1, 100))
    p_values = [two_sided_p(means) for means in resampled_means(values, resamples=1000)]
    assert scipy.stats.kstest(p_values, "uniform").statistic < 0.06
    agreed = [scipy.stats.ttest_1samp(row[0], 0.0).pvalue for row in values]
    np.testing.assert_allclose(p_values, agreed, atol=0.12)


def test_holm_hand_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-12)
    assert holm([0.5, 0.9, 0.6]) == pytest.approx([1.0, 1.0, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@quick
@given(st.lists(st.floats(0.0, 1.0), max_size=8))
def test_holm_agrees_with_a_loop(p_values):
    expected = [
        min(1.0, max((sum(r >= q for r in p_values)) * q for q in p_values if q <= p)) for p in p_values
    ]  # q's factor: how many p-values are not below it; of equal ones the first has the most
    assert holm(p_values) == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.nan])
def test_holm_of_what_is_no_probability_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"from 0 to 1, found \[{wrong}\]"):
        holm([0.5, wrong])


def logit(confidence):
    return math.log(confidence / (1.0 - confidence))


def test_calibration_hand_example():
    margins = np.array([0.0, logit(0.6), -logit(0.62), logit(0.7), logit(0.8), 800.0, -800.0, 900.0])
    first, second, third, last = calibration(margins, [0.5, 0.65, 0.82, 0.9])
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
    bins = calibration(np.array(margins, dtype=np.float64), [0.5, *sorted(edges)])
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


def test_labels_drawn_from_the_model_are_calibrated():
    generator = np.random.default_rng(10)
    difference = generator.normal(scale=2.0, size=40_000)
    right = generator.random(40_000) < 1.0 / (1.0 + np.exp(-np.abs(difference)))
    margins = np.where(right, 1.0, -1.0) * np.abs(difference)
    edges = [0.5, 0.6, 0.7, 0.8, 0.9]
    assert calibration_error(calibration(margins, edges)) < 0.01
    assert calibration_error(calibration(3.0 * margins, edges)) > 0.05  # too sure of itself


@pytest.mark.parametrize("edges", [[], [0.6], [0.5, 0.7, 0.7], [0.5, 0.8, 0.7], [0.5, 1.0], [0.0, 0.5]])
def test_calibration_edges_that_do_not_rise_from_a_half_are_refused(edges):
    with pytest.raises(ValueError, match=r"rise from 0\.5 to below 1, found"):
        calibration(np.zeros(3), edges)


def test_calibration_of_nothing_is_refused():
    with pytest.raises(ValueError, match="1 of 2 margins are nan"):
        calibration(np.array([1.0, math.nan]), [0.5])
    with pytest.raises(ValueError, match="at least one pair"):
        calibration_error(calibration(np.array([]), [0.5]))


@quick
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_value_at_agrees_with_numpy_column_by_column(points, n, seed):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(2, points, n))
    at = np.where(generator.random(n) < 0.3, x[generator.integers(points), np.arange(n)], generator.normal(size=n))
    expected = []
    for column in range(n):
        order = np.argsort(x[:, column])
        xs, ys = x[order, column], y[order, column]
        expected.append(np.interp(at[column], xs, ys, left=math.nan, right=math.nan))
    np.testing.assert_allclose(value_at(x, y, at), expected, rtol=1e-9, atol=1e-9)


def test_value_at_hand_example():
    x = np.array([[3.0, 3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    y = np.array([[30.0, 30.0, 30.0, 30.0, 30.0], [10.0, 10.0, 10.0, 10.0, 10.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    at = np.array([1.25, 2.5, 3.0, 0.9, 3.1])
    np.testing.assert_allclose(value_at(x, y, at), [7.5, 15.0, 30.0, math.nan, math.nan], rtol=1e-12)


def test_value_at_points_with_the_same_x_is_the_last_of_them():
    x, y = np.array([[1.0], [1.0], [0.0]]), np.array([[5.0], [7.0], [1.0]])
    assert value_at(x, y, np.array([1.0])) == [7.0]
    assert value_at(x, y, np.array([0.5])) == [3.0]
    assert value_at(np.array([[2.0]]), np.array([[4.0]]), np.array([2.0])) == [4.0]


def test_value_at_without_points_is_refused():
    with pytest.raises(ValueError, match="at least one point"):
        value_at(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(2))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(Exception, match=r"shape|type"):
        value_at(np.zeros((3, 2)), np.zeros((3, 1)), np.zeros(2))
    with pytest.raises(Exception, match=r"shape|type"):
        crossed_interval(np.zeros(4))
