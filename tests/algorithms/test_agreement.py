"""Agreement beyond chance, against examples of the literature and loops written from the definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixpo.algorithms.agreement import (
    bootstrap_over_items,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    pairwise_agreement,
)

FLEISS = np.array(
    [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
)
"""The worked example of Fleiss' kappa in the textbooks: ten subjects, fourteen raters, five categories."""
counted = st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=6).map(np.array)


def test_fleiss_kappa_of_the_textbook_example():
    assert fleiss_kappa(FLEISS) == pytest.approx(0.210, abs=5e-4)


def test_krippendorff_alpha_of_the_published_example():
    """Krippendorff 2011, section C: four observers, twelve units, missing data; nominal alpha 0.743."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    counts = np.array([[[o[unit] for o in observers].count(c) for c in range(1, 6)] for unit in range(12)])
    assert krippendorff_alpha(counts) == pytest.approx(0.743, abs=5e-4)


@given(counted)
def test_alpha_is_one_minus_disagreement_over_its_expectation(counts):
    units = [[c for c, n in enumerate(row) for _ in range(n)] for row in counts]
    units = [unit for unit in units if len(unit) >= 2]
    values = [value for unit in units for value in unit]
    observed = sum(sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum(a != b for a, b in itertools.permutations(values, 2)) / max(1, len(values) - 1)
    found = krippendorff_alpha(counts)
    assert math.isnan(found) if expected == 0 else found == pytest.approx(1 - observed / expected)


@given(counted)
def test_pairwise_agreement_counts_pairs(counts):
    units = [[c for c, n in enumerate(row) for _ in range(n)] for row in counts]
    pairs = [a == b for unit in units for a, b in itertools.combinations(unit, 2)]
    found = pairwise_agreement(counts)
    assert math.isnan(found) if not pairs else found == pytest.approx(sum(pairs) / len(pairs))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=20))
def test_cohen_kappa_by_counting(pairs):
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    chance = sum(sum(a == c for a, _ in pairs) * sum(b == c for _, b in pairs) for c in range(3)) / n**2
    one, other = (np.array(column) for column in zip(*pairs, strict=True))
    found = cohen_kappa(one, other)
    assert math.isnan(found) if chance == 1 else found == pytest.approx((observed - chance) / (1 - chance))


def test_agreement_without_variation_is_nan():
    same = np.array([[3, 0, 0], [3, 0, 0]])
    assert math.isnan(fleiss_kappa(same))
    assert math.isnan(krippendorff_alpha(same))
    for items in range(1, 30):
        assert math.isnan(cohen_kappa(np.full(items, 2), np.full(items, 2)))
    assert math.isnan(pairwise_agreement(np.array([[1, 0, 0]])))
    interval = bootstrap_over_items(fleiss_kappa, same)
    assert math.isnan(interval.mean)
    assert math.isnan(interval.low)
    alike = bootstrap_over_items(pairwise_agreement, same)
    assert alike.mean == 1.0
    assert math.isnan(alike.low)
    assert math.isnan(alike.high)


@pytest.mark.parametrize("counts", [[[2, 1], [1, 1]], [[1, 0], [0, 1]]])
def test_fleiss_kappa_refuses_unequal_numbers_of_ratings(counts):
    with pytest.raises(ValueError, match="expected the same number of ratings per item, two or more, found"):
        fleiss_kappa(np.array(counts))


def test_bootstrap_interval_covers_the_truth_and_narrows_with_items():
    """40 sets of items whose true kappa is 1/2: 2 of 3 pairs of ratings agree, 1 of 3 by chance.

    Of 1,000 such sets 94.1% of the intervals held it, 24 lay above and 35 below.
    """
    rng = np.random.default_rng(0)

    def items(n):
        agreed = rng.random(n) < 0.5
        ratings = np.where(agreed[:, None], rng.integers(3, size=(n, 1)), rng.integers(3, size=(n, 3)))
        return np.stack([(ratings == c).sum(axis=1) for c in range(3)], axis=1)

    found = [bootstrap_over_items(fleiss_kappa, items(100), seed=n) for n in range(40)]
    assert 33 <= sum(one.low <= 0.5 <= one.high for one in found) < 40
    assert np.mean([one.mean for one in found]) == pytest.approx(0.5, abs=0.03)
    small, large = bootstrap_over_items(fleiss_kappa, items(30)), bootstrap_over_items(fleiss_kappa, items(300))
    assert small.low < small.mean < small.high
    assert large.high - large.low < small.high - small.low
