"""Agreement of raters of the same items: Cohen's kappa, Fleiss' kappa, Krippendorff's alpha."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int

from mixpo.algorithms.intervals import Interval

RESAMPLES = 1_000


def cohen_kappa(first_ratings: Int[np.ndarray, " items"], second_ratings: Int[np.ndarray, " items"]) -> float:
    """Cohen's kappa of categories 0, 1, ... (Cohen 1960): (p_observed - p_chance) / (1 - p_chance), or nan."""
    if first_ratings.size == 0:
        return float("nan")
    categories = int(max(first_ratings.max(), second_ratings.max())) + 1
    counts = np.zeros((categories, categories), dtype=np.int64)
    np.add.at(counts, (first_ratings, second_ratings), 1)
    observed, chance = int(np.trace(counts)) * first_ratings.size, int(counts.sum(axis=1) @ counts.sum(axis=0))
    return (observed - chance) / (first_ratings.size**2 - chance) if chance < first_ratings.size**2 else float("nan")


def fleiss_kappa(rating_counts: Int[np.ndarray, "items categories"]) -> float:
    """Fleiss' kappa of items with equally many ratings (Fleiss 1971), by statsmodels; nan if undefined.

    counts[i, c] is the number of ratings of item i with category c. nan without items, and if all ratings are of one
    category. Raises ValueError if the number of ratings differs between items or is less than two.
    """
    ratings = np.unique(rating_counts.sum(axis=1))
    if len(ratings) > 1 or (len(ratings) == 1 and ratings[0] < 2):
        raise ValueError(f"expected the same number of ratings per item, two or more, found {ratings.tolist()}")
    if len(rating_counts) == 0 or np.count_nonzero(rating_counts.sum(axis=0)) < 2:
        return float("nan")
    from statsmodels.stats.inter_rater import fleiss_kappa as statsmodels_kappa  # slow to import

    return float(statsmodels_kappa(rating_counts))


def krippendorff_alpha(rating_counts: Int[np.ndarray, "items categories"]) -> float:
    """Krippendorff's alpha of nominal ratings (Krippendorff 2011): 1 - D_observed / D_expected; nan if undefined.

    With n_ic of item i's m_i ratings in category c, and n = sum m_i over the items with two ratings or more:
    1 - (n - 1) sum_i [m_i^2 - sum_c n_ic^2] / (m_i - 1) / (n^2 - sum_c n_c^2). nan if no two ratings differ, or no item
    has two.
    """
    rating_counts = rating_counts[rating_counts.sum(axis=1) >= 2].astype(np.float64)
    per_item, per_category = rating_counts.sum(axis=1), rating_counts.sum(axis=0)
    expected = float(per_item.sum() ** 2 - (per_category**2).sum())
    if expected == 0.0:
        return float("nan")
    observed = float(((per_item**2 - (rating_counts**2).sum(axis=1)) / (per_item - 1.0)).sum())
    return 1.0 - (float(per_item.sum()) - 1.0) * observed / expected


def pairwise_agreement(rating_counts: Int[np.ndarray, "items categories"]) -> float:
    """Share of agreeing pairs among all pairs of ratings of the same item; nan if no item has two ratings."""
    per_item = rating_counts.sum(axis=1)
    pairs = float((per_item * (per_item - 1)).sum())
    return float((rating_counts * (rating_counts - 1)).sum()) / pairs if pairs else float("nan")


def bootstrap_over_items(
    statistic: Callable[[Int[np.ndarray, "items categories"]], float],
    rating_counts: Int[np.ndarray, "items categories"],
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A statistic with its percentile bootstrap interval, resampling items with replacement (Efron 1979).

    Resamples with an undefined statistic (nan) are left out. The bounds are nan if a tenth of the resamples or more are
    undefined, or if all others are equal.
    """
    generator = np.random.default_rng(seed)
    items = len(rating_counts)
    resamples = generator.integers(items, size=(RESAMPLES, items)) if items else np.zeros((0, 0), dtype=np.int64)
    values: Float64[np.ndarray, " resamples"] = np.array(
        [statistic(rating_counts[r]) for r in resamples], dtype=np.float64
    )
    defined = values[~np.isnan(values)]
    estimate = statistic(rating_counts)
    if len(defined) <= 0.9 * RESAMPLES or np.isnan(estimate):
        return Interval(estimate, float("nan"), float("nan"))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return Interval(estimate, float(low), float(high)) if high - low > 1e-9 else Interval(estimate, np.nan, np.nan)
