"""How far those who judge the same items agree beyond chance: Cohen's and Fleiss' kappa, Krippendorff's alpha."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int

from mixpo.algorithms.intervals import Interval

RESAMPLES = 1_000


def cohen_kappa(one: Int[np.ndarray, " items"], other: Int[np.ndarray, " items"]) -> float:
    """(p_observed - p_chance) / (1 - p_chance) of two raters (Cohen 1960); categories are numbers from 0.

    nan where both always say the same one thing, so that chance alone makes them agree, and without items.
    """
    if one.size == 0:
        return float("nan")
    categories = int(max(one.max(), other.max())) + 1
    counts = np.zeros((categories, categories), dtype=np.int64)
    np.add.at(counts, (one, other), 1)
    observed, chance = int(np.trace(counts)) * one.size, int(counts.sum(axis=1) @ counts.sum(axis=0))
    return (observed - chance) / (one.size**2 - chance) if chance < one.size**2 else float("nan")


def fleiss_kappa(counts: Int[np.ndarray, "items categories"]) -> float:
    """Kappa of the same number of ratings an item (Fleiss 1971); counts[i, c] of them chose category c. By statsmodels.

    nan where all ratings are of one category, and without items. Raises ValueError where items have unlike numbers of
    ratings, or fewer than two.
    """
    ratings = np.unique(counts.sum(axis=1))
    if len(ratings) > 1 or (len(ratings) == 1 and ratings[0] < 2):
        raise ValueError(f"expected the same number of ratings an item, two or more, found {ratings.tolist()}")
    if len(counts) == 0 or np.count_nonzero(counts.sum(axis=0)) < 2:
        return float("nan")
    from statsmodels.stats.inter_rater import fleiss_kappa as of_statsmodels  # slow to import

    return float(of_statsmodels(counts))


def krippendorff_alpha(counts: Int[np.ndarray, "items categories"]) -> float:
    """1 - D_observed / D_expected for nominal ratings (Krippendorff 2011); items may have unlike numbers of them.

    With n_ic of item i's m_i ratings in category c, and n = sum m_i over the items of two ratings or more:
    1 - (n - 1) sum_i [m_i^2 - sum_c n_ic^2] / (m_i - 1) / (n^2 - sum_c n_c^2). nan where no two ratings differ, or no
    item has two.
    """
    counts = counts[counts.sum(axis=1) >= 2].astype(np.float64)
    each, of_category = counts.sum(axis=1), counts.sum(axis=0)
    expected = float(each.sum() ** 2 - (of_category**2).sum())
    if expected == 0.0:
        return float("nan")
    observed = float(((each**2 - (counts**2).sum(axis=1)) / (each - 1.0)).sum())
    return 1.0 - (float(each.sum()) - 1.0) * observed / expected


def pairwise_agreement(counts: Int[np.ndarray, "items categories"]) -> float:
    """The share of pairs of ratings of one item that agree; nan where no item has two ratings."""
    each = counts.sum(axis=1)
    pairs = float((each * (each - 1)).sum())
    return float((counts * (counts - 1)).sum()) / pairs if pairs else float("nan")


def bootstrap_over_items(
    statistic: Callable[[Int[np.ndarray, "items categories"]], float],
    counts: Int[np.ndarray, "items categories"],
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A statistic of items with its percentile bootstrap interval: items drawn with replacement (Efron 1979).

    Resamples in which it is not defined are left out; its bounds are nan where that is a tenth of them or more, and
    where the others are all alike, since a constant has no spread to resample.
    """
    generator = np.random.default_rng(seed)
    items = len(counts)
    drawn = generator.integers(items, size=(RESAMPLES, items)) if items else np.zeros((0, 0), dtype=np.int64)
    found: Float64[np.ndarray, " resamples"] = np.array([statistic(counts[rows]) for rows in drawn], dtype=np.float64)
    defined = found[~np.isnan(found)]
    estimate = statistic(counts)
    if len(defined) <= 0.9 * RESAMPLES or np.isnan(estimate):
        return Interval(estimate, float("nan"), float("nan"))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return Interval(estimate, float(low), float(high)) if high - low > 1e-9 else Interval(estimate, np.nan, np.nan)
