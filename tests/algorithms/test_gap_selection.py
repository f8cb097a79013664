import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixpo.algorithms.selection import (
    compute_easy_mask,
    compute_score_gaps,
    compute_threshold_for_easy_fraction,
    order_by_score,
)

quick = settings(deadline=None, derandomize=True, max_examples=200)
coarse = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=30)  # many ties
fraction = st.floats(0.01, 0.99)


def pairs(*scores):
    return np.array(scores, dtype=np.float64)


def test_the_boundary_is_strict_and_hard():
    assert compute_easy_mask(np.array([0.0, 1.0, 1.0 + 1e-12, 2.0]), 1.0).tolist() == [False, False, True, True]


@quick
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=30), st.floats(0.0, 5.0))
def test_a_pair_is_easy_if_its_gap_exceeds_the_threshold(scores, threshold):
    easy = compute_easy_mask(compute_score_gaps(pairs(*scores)), threshold)
    for (one, other), is_easy in zip(scores, easy, strict=True):
        assert is_easy == (max(one, other) - min(one, other) > threshold)


@quick
@given(coarse, fraction)
def test_easy_fraction_is_never_exceeded(gaps, easy_fraction):
    gaps = np.array(gaps)
    easy = compute_easy_mask(gaps, compute_threshold_for_easy_fraction(gaps, easy_fraction))
    assert easy.sum() <= round(easy_fraction * len(gaps))
    if easy.any():
        assert gaps[easy].min() > gaps[~easy].max()


@quick
@given(st.lists(st.integers(0, 1000).map(float), min_size=2, max_size=30, unique=True), fraction)
def test_easy_fraction_is_exact_without_ties(gaps, easy_fraction):
    count = round(easy_fraction * len(gaps))
    gaps = np.array(gaps)
    easy = compute_easy_mask(gaps, compute_threshold_for_easy_fraction(gaps, easy_fraction))
    if count < len(gaps):  # the smallest gap is never easy: the threshold is itself a gap
        assert set(gaps[easy]) == set(sorted(gaps, reverse=True)[:count])
    else:
        assert easy.sum() == len(gaps) - 1


@pytest.mark.parametrize("easy_fraction", [0.0, 1.0, -0.1, 60.0, float("nan")])
def test_an_easy_fraction_that_leaves_nothing_is_refused(easy_fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        compute_threshold_for_easy_fraction(np.array([1.0, 2.0]), easy_fraction)


def test_order_by_score_puts_the_higher_first_and_keeps_ties():
    scores = pairs((1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (-1.0, -2.0), (0.0, -0.0))
    assert order_by_score(scores).tolist() == [[1, 0], [0, 1], [0, 1], [0, 1], [0, 1]]
