"""Figures with their uncertainty: intervals, p-values, win/tie/lose, accuracy by gap, calibration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64, UInt16
from scipy.special import bdtr, expit, ndtr, ndtri, stdtr, stdtrit

CHUNK = 1 << 22
"""Resampled values held at once."""
FEWEST_DECIDED = 10
"""Wins and defeats from which a win rate at equal length is told: its errors are those of many."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Sequence[float] | Float64[np.ndarray, " n"], *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """The mean with its percentile bootstrap interval (Efron 1979): values drawn with replacement, `resamples` times.

    Raises ValueError without values. One value has no spread to resample: its bounds are nan.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("a mean needs at least one value")
    if array.size == 1:
        return Interval(float(array[0]), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // array.size)
    means = np.concatenate(
        [
            array[generator.integers(array.size, size=(min(rows, resamples - start), array.size))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(array.mean()), float(low), float(high))


def resampled_means(
    values: Float64[np.ndarray, "items seeds prompts"], *, seed: int = 0, resamples: int = 10_000
) -> Float64[np.ndarray, "items resamples"]:
    """Means of every item in `resamples` crossed resamples: the pigeonhole bootstrap (Owen 2007).

    A resample draws S - 1 of S seeds with replacement, so that the variance between seeds is unbiased (Rao and Wu
    1988), and, independently, as many prompts as there are; a value counts as often as its seed times its prompt was
    drawn. The same draws serve every item, so a difference of two rows is paired. Of a single seed only prompts vary,
    of a single prompt only seeds. Raises ValueError without values or resamples.
    """
    items, seeds, prompts = values.shape
    if values.size == 0:
        raise ValueError(f"a mean needs at least one value, found {items} items of {seeds} seeds and {prompts} prompts")
    if resamples < 1:
        raise ValueError(f"expected at least one resample, found {resamples}")
    flat = values.reshape(items * seeds, prompts)
    means = []
    for seed_counts, prompt_counts in _draws(seeds, prompts, seed, resamples):
        sums = (flat @ prompt_counts.T.astype(np.float64)).reshape(items, seeds, len(seed_counts))
        means.append(np.einsum("isr,rs->ir", sums, seed_counts.astype(np.float64)))
    return np.asarray(np.concatenate(means, axis=1) / (max(1, seeds - 1) * prompts))


@lru_cache(maxsize=4)
def _draws(
    seeds: int, prompts: int, seed: int, resamples: int
) -> list[tuple[UInt16[np.ndarray, "resamples seeds"], UInt16[np.ndarray, "resamples prompts"]]]:
    """How often each seed and prompt is drawn in each resample, in chunks; kept, since a report asks for them often."""
    seed_generator, prompt_generator = np.random.default_rng(seed).spawn(2)
    rows = max(1, CHUNK // max(seeds, prompts))
    chunks = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        seed_counts = seed_generator.multinomial(max(1, seeds - 1), np.full(seeds, 1.0 / seeds), size)
        prompt_counts = prompt_generator.multinomial(prompts, np.full(prompts, 1.0 / prompts), size)
        chunks.append((seed_counts.astype(np.uint16), prompt_counts.astype(np.uint16)))
    return chunks


def degrees_of_freedom(values: Float64[np.ndarray, "seeds prompts"]) -> float:
    """Of the crossed mean's variance, v_seeds + v_prompts (Satterthwaite 1946): few where a few seeds are most of it.

    (v_seeds + v_prompts)^2 / (v_seeds^2 / (S - 1) + v_prompts^2 / (P - 1)), v the variance of an axis's means over its
    length. Infinite where nothing varies.
    """
    total, weighted = 0.0, 0.0
    for means in (values.mean(axis=1), values.mean(axis=0)):
        if len(means) > 1:
            variance = float(means.var(ddof=1)) / len(means)
            total, weighted = total + variance, weighted + variance**2 / (len(means) - 1)
    return total**2 / weighted if weighted else math.inf


def percentile_interval(
    mean: float, means: Float64[np.ndarray, " resamples"], *, level: float = 0.95, df: float = math.inf
) -> Interval:
    """`mean` between the percentiles of its resamples, expanded for few degrees of freedom.

    The tails are Phi(t) with t Student's quantile at `df` (Efron 1979; Hesterberg 2015, section 4.3.3). Raises
    ValueError on no resample or a nan one.
    """
    _check_resamples(means)
    tail = (1.0 - level) / 2.0
    if math.isfinite(df):
        tail = float(ndtr(stdtrit(df, tail)))
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(mean, float(low), float(high))


def _check_resamples(means: Float64[np.ndarray, " resamples"]) -> None:
    """Raises ValueError where there is no resample or one is nan."""
    if means.size == 0:
        raise ValueError("expected at least one resample, found none")
    if missing := int(np.isnan(means).sum()):
        raise ValueError(f"{missing} of {means.size} resamples are nan; drop them or fix the values they come from")


def crossed_interval(
    values: Float64[np.ndarray, "seeds prompts"], *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """The mean over seeds and prompts with the percentile interval of `resampled_means`, expanded for few seeds.

    It speaks of other seeds and other prompts alike. One seed of one prompt has no spread: its bounds are nan.
    """
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    means = resampled_means(values[None], seed=seed, resamples=resamples)[0]
    return percentile_interval(mean, means, level=level, df=degrees_of_freedom(values))


def two_sided_p(means: Float64[np.ndarray, " resamples"], *, df: float = math.inf) -> float:
    """The bootstrap p-value of "the mean is 0": twice the rarer side of 0, at most 1, expanded as the interval is.

    p = min(1, 2 (min(#{means <= 0}, #{means >= 0}) + 1) / (n + 1)): the values themselves count as one more resample
    (Davison and Hinkley 1997, chapter 4), so p is never 0. With few degrees of freedom its normal quantile is read as
    Student's. Raises ValueError on no resample or a nan one.
    """
    _check_resamples(means)
    rarer = min(int((means <= 0).sum()), int((means >= 0).sum()))
    tail = min(0.5, (rarer + 1) / (means.size + 1))
    return 2.0 * (float(stdtr(df, ndtri(tail))) if math.isfinite(df) else tail)


def estimate(
    mean: float, means: Float64[np.ndarray, " resamples"], values: Float64[np.ndarray, "seeds prompts"]
) -> tuple[Interval, float]:
    """A mean's 95% interval and the p of "it is 0", from its resamples and the values that decide its freedom.

    Where all resamples lie on one side, the tail that they cannot resolve is Student's, at the resamples' own spread:
    without it no p of a few seeds would survive a correction. One value has no interval and tells nothing, p 1.
    """
    if values.size == 1:
        return Interval(mean, math.nan, math.nan), 1.0
    df, spread = degrees_of_freedom(values), float(means.std())
    p = two_sided_p(means, df=df)
    if spread and not means.min() <= 0 <= means.max():
        t = -abs(mean) / spread
        p = min(p, 2 * float(stdtr(df, t) if math.isfinite(df) else ndtr(t)))
    return percentile_interval(mean, means, df=df), p


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979), in the order given. Raises ValueError on one outside [0, 1]."""
    if wrong := [p for p in p_values if not 0.0 <= p <= 1.0]:
        raise ValueError(f"expected p-values from 0 to 1, found {wrong}")
    order = np.argsort(p_values, kind="stable")
    left = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * left), 1.0)
    return corrected.tolist()


def wilson_interval(successes: int | float, trials: int, *, level: float = 0.95) -> Interval:
    """A share and its score interval (Wilson 1927); a tie may count half. Raises ValueError without trials."""
    if trials < 1:
        raise ValueError("a share needs at least one trial")
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def sign_test(wins: int, defeats: int) -> float:
    """The exact two-sided p of "a win is as likely as a defeat"; ties tell nothing, and without either it is 1."""
    return min(1.0, 2.0 * float(bdtr(min(wins, defeats), wins + defeats, 0.5))) if wins + defeats else 1.0


def win_minus_lose(wins: int, ties: int, defeats: int, *, level: float = 0.95) -> Interval:
    """The share of wins minus that of defeats, with an interval that is honest for few prompts too.

    Agresti and Min 2005: 1/2 is added to each cell of the table of matched pairs, so 1/2 to wins and to defeats and 1
    to ties, which are two of its cells; then it is Wald's, (w - d) / n -+ z sqrt(w + d - (w - d)^2 / n) / n, within
    [-1, 1]. Raises ValueError without prompts.
    """
    if wins + ties + defeats < 1:
        raise ValueError("a difference of shares needs at least one prompt")
    n, decided, lead = wins + ties + defeats + 2.0, wins + defeats + 1.0, wins - defeats
    half = NormalDist().inv_cdf(0.5 + level / 2.0) * (decided - lead * lead / n) ** 0.5 / n
    return Interval(lead / (n - 2.0), max(-1.0, lead / n - half), min(1.0, lead / n + half))


def win_tie_lose(one: Float64[np.ndarray, " n"], other: Float64[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Shares of places at which `one` is greater than, equal to, and less than `other`. They sum to 1."""
    return float((one > other).mean()), float((one == other).mean()), float((one < other).mean())


def length_controlled(wins: Float64[np.ndarray, " n"], longer: Float64[np.ndarray, " n"]) -> Interval | None:
    """The win rate at equal length with its 95% interval (Dubois et al. 2024, without their difficulty of prompts).

    sigma(theta) of the logistic regression sigma(theta + phi tanh(d / sd(d))) of wins (1, a tie 0.5, a defeat 0) on how
    much longer, d, the first completion is; the errors are robust, since a tie is no draw of 0 or 1, times the root of
    n / (n - 2) for the two that are fitted. None where it cannot be told: of fewer than `FEWEST_DECIDED` wins and
    defeats, where d does not vary, and where a length parts wins from defeats, so that no theta is best (Albert and
    Anderson 1984).
    """
    won, lost = longer[wins > 0.0], longer[wins < 1.0]
    parted = won.size == 0 or lost.size == 0 or won.min() >= lost.max() or won.max() <= lost.min()
    if parted or (wins != 0.5).sum() < FEWEST_DECIDED or longer.min() == longer.max():
        return None
    from statsmodels.genmod.families import Binomial  # slow to import
    from statsmodels.genmod.generalized_linear_model import GLM

    lengths = np.tanh(longer / longer.std())
    fit = GLM(wins, np.column_stack([np.ones_like(lengths), lengths]), family=Binomial()).fit(cov_type="HC0")
    if not fit.converged:
        return None
    half = NormalDist().inv_cdf(0.975) * fit.bse[0] * (len(wins) / (len(wins) - 2)) ** 0.5
    return Interval(*(float(expit(fit.params[0] + shift)) for shift in (0.0, -half, half)))


@dataclass(frozen=True)
class AccuracyBin:
    """Pairs whose gap lies in [low, high), and the share of them that the reward model orders as people did."""

    low: float
    high: float
    """Infinite for the last bin."""
    count: int
    accuracy: float | None
    """None in an empty bin."""
    interval: Interval | None


def accuracy_by_gap(margins: Float64[np.ndarray, " n"], edges: Sequence[float]) -> list[AccuracyBin]:
    """Accuracy and count per bin of |margin|, margin = score of chosen - score of rejected. Figure 2 of the paper.

    `edges` are the bins' lower bounds, from 0 up; the last bin is open, so every pair is in exactly one. A margin of
    exactly 0 decides nothing and counts as wrong. Raises ValueError on edges that do not rise from 0.
    """
    bounds = [*edges, float("inf")]
    if bounds[0] != 0.0 or any(low >= high for low, high in pairwise(bounds)):
        raise ValueError(f"expected edges that rise from 0, found {list(edges)}")
    bins = []
    for low, high in pairwise(bounds):
        inside = margins[(np.abs(margins) >= low) & (np.abs(margins) < high)]
        correct = int((inside > 0).sum())
        accuracy = correct / len(inside) if len(inside) else None
        interval = wilson_interval(correct, len(inside)) if len(inside) else None
        bins.append(AccuracyBin(low, high, len(inside), accuracy, interval))
    return bins


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose confidence lies in [low, high), the last bin's in [low, 1]: what was predicted and what was seen."""

    low: float
    high: float
    count: int
    predicted: float | None
    """The mean confidence. None in an empty bin."""
    observed: float | None
    """The share of pairs that the reward model orders as people did, a margin of 0 counting half."""
    interval: Interval | None
    """Of the observed share (Wilson)."""


def calibration(margins: Float64[np.ndarray, " n"], edges: Sequence[float]) -> list[CalibrationBin]:
    """Predicted and observed accuracy per bin of sigma(|margin|), the Bradley-Terry probability of the order given.

    margin = score of chosen - score of rejected. `edges` are the bins' lower bounds, from 0.5 up; the last bin is
    closed at 1, so every pair is in exactly one. Raises ValueError on edges that do not rise from 0.5 to below 1 and
    on a margin of nan.
    """
    bounds = [*edges, 1.0]
    if bounds[0] != 0.5 or any(low >= high for low, high in pairwise(bounds)):
        raise ValueError(f"expected edges that rise from 0.5 to below 1, found {list(edges)}")
    if missing := int(np.isnan(margins).sum()):
        raise ValueError(f"{missing} of {margins.size} margins are nan; drop them or fix the scores they come from")
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    index = np.searchsorted(edges, confidence, side="right") - 1
    bins = []
    for number, (low, high) in enumerate(pairwise(bounds)):
        inside = index == number
        count = int(inside.sum())
        if count == 0:
            bins.append(CalibrationBin(low, high, 0, None, None, None))
            continue
        ordered = float((np.sign(margins[inside]) + 1.0).sum() / 2.0)
        interval = wilson_interval(ordered, count)
        bins.append(CalibrationBin(low, high, count, float(confidence[inside].mean()), interval.mean, interval))
    return bins


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error: the mean |predicted - observed|, weighted by count (Naeini et al. 2015).

    Raises ValueError where every bin is empty.
    """
    total = sum(b.count for b in bins)
    if total == 0:
        raise ValueError("a calibration error needs at least one pair")
    gaps = (b.count * abs(b.predicted - b.observed) for b in bins if b.predicted is not None and b.observed is not None)
    return sum(gaps) / total


def value_at(
    x: Float64[np.ndarray, "points n"], y: Float64[np.ndarray, "points n"], at: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """Column by column, y where x is `at`, on straight lines between the points in order of x; nan outside them.

    Of points with the same x the last one given counts. Raises ValueError without points.
    """
    if len(x) == 0:
        raise ValueError("a line needs at least one point")
    order = np.argsort(x, axis=0, kind="stable")
    x, y = np.take_along_axis(x, order, axis=0), np.take_along_axis(y, order, axis=0)
    columns = np.arange(x.shape[1])
    left = np.maximum((x <= at).sum(axis=0) - 1, 0)
    right = np.minimum(left + 1, len(x) - 1)
    width = x[right, columns] - x[left, columns]
    weight = np.divide(at - x[left, columns], width, out=np.zeros_like(at), where=width > 0.0)
    value = y[left, columns] + weight * (y[right, columns] - y[left, columns])
    return np.where((at >= x[0]) & (at <= x[-1]), value, np.nan)
