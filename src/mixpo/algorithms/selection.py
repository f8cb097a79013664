"""Selection of easy and hard pairs by their score gap (algorithm 1 of the paper). Arrays are float64."""

import numpy as np
from jaxtyping import Bool, Float64, Int64


def compute_score_gaps(scores: Float64[np.ndarray, "pairs 2"]) -> Float64[np.ndarray, " pairs"]:
    """Absolute score difference between the two completions of each pair."""
    return np.asarray(np.abs(scores[:, 0] - scores[:, 1]))


def compute_easy_mask(gaps: Float64[np.ndarray, " pairs"], threshold: float) -> Bool[np.ndarray, " pairs"]:
    """Mask of the easy pairs: True where the gap is strictly greater than the threshold; all others are hard."""
    return np.asarray(gaps > threshold)


def compute_threshold_for_easy_fraction(gaps: Float64[np.ndarray, " pairs"], easy_fraction: float) -> float:
    """Gap above which round(easy_fraction * pairs) pairs are easy, fewer if gaps tie; it is one of the gaps."""
    if not 0.0 < easy_fraction < 1.0:
        raise ValueError(f"easy_fraction must lie between 0 and 1, found {easy_fraction}")
    count = round(easy_fraction * len(gaps))
    return float(np.sort(gaps)[::-1][min(count, len(gaps) - 1)])


def order_by_score(scores: Float64[np.ndarray, "pairs 2"]) -> Int64[np.ndarray, "pairs 2"]:
    """Indices (chosen, rejected) of each pair's two completions: higher score first, sampling order if equal."""
    return np.argsort(-scores, axis=1, kind="stable")
