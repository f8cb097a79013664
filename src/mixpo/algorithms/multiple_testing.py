"""Correction of p-values for multiple testing."""

from collections.abc import Sequence

import numpy as np


def correct_by_holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected by Holm (1979), in the given order. Raises ValueError on one outside [0, 1]."""
    if invalid := [p for p in p_values if not 0.0 <= p <= 1.0]:
        raise ValueError(f"expected p-values from 0 to 1, found {invalid}")
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * factors), 1.0)
    return corrected.tolist()
