"""The split of scored pairs by their gap. Algorithm 1 of the paper. Arrays are float64."""

import numpy as np
from jaxtyping import Bool, Float64, Int64


def score_gaps(scores: Float64[np.ndarray, "pairs 2"]) -> Float64[np.ndarray, " pairs"]:
    """|score of one completion - score of the other|."""
    return np.asarray(np.abs(scores[:, 0] - scores[:, 1]))


def easy_mask(gaps: Float64[np.ndarray, " pairs"], threshold: float) -> Bool[np.ndarray, " pairs"]:
    """True where the gap is strictly greater than the threshold: easy. All others are hard, equal scores among them."""
    return np.asarray(gaps > threshold)


def threshold_for_easy_fraction(gaps: Float64[np.ndarray, " pairs"], easy_fraction: float) -> float:
    """The threshold that makes round(easy_fraction * pairs) pairs easy, fewer where gaps tie at the boundary.

    It is itself one of the gaps, so at least the pair with the smallest gap is hard.
    """
    if not 0.0 < easy_fraction < 1.0:
        raise ValueError(f"easy_fraction must lie between 0 and 1, found {easy_fraction}")
    count = round(easy_fraction * len(gaps))
    return float(np.sort(gaps)[::-1][min(count, len(gaps) - 1)])


def order_by_score(scores: Float64[np.ndarray, "pairs 2"]) -> Int64[np.ndarray, "pairs 2"]:
    """The places of (chosen, rejected) in each pair, by score; equal scores keep the order in which they were drawn."""
    return np.argsort(-scores, axis=1, kind="stable")
