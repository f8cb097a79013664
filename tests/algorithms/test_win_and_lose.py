"""Wins against defeats of a few prompts: against scipy and tables worked by hand, and how often intervals cover."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, multinomial

from mixpo.algorithms.win_rates import compute_sign_test_p_value, win_minus_loss_rate


@pytest.mark.parametrize(("wins", "defeats"), [(2, 0), (5, 0), (0, 6), (3, 2), (4, 4), (1, 0), (40, 21), (700, 801)])
def test_sign_test_agrees_with_scipy(wins, defeats):
    assert compute_sign_test_p_value(wins, defeats) == pytest.approx(binomtest(wins, wins + defeats).pvalue, rel=1e-10)
    assert compute_sign_test_p_value(wins, defeats) == compute_sign_test_p_value(defeats, wins)


def test_two_wins_of_two_are_not_significant():
    assert compute_sign_test_p_value(2, 0) == 0.5
    assert compute_sign_test_p_value(5, 0) == 0.0625
    assert compute_sign_test_p_value(0, 0) == 1.0
    assert win_minus_loss_rate(2, 0, 0).low < 0.0


def test_win_minus_lose_interval_by_hand():
    # 7 wins, 2 ties, 1 defeat: 7.5, 1.5 and 1.5 + 1.5 of the matched pairs' four cells, 12 in all
    found = win_minus_loss_rate(7, 2, 1)
    assert found.mean == pytest.approx(0.6)
    half = 1.959964 * math.sqrt(7.5 + 1.5 - 6.0**2 / 12.0) / 12.0
    assert [found.low, found.high] == pytest.approx([0.5 - half, 0.5 + half], rel=1e-6)
    turned = win_minus_loss_rate(1, 2, 7)
    assert [turned.mean, turned.low, turned.high] == pytest.approx([-found.mean, -found.high, -found.low])
    alike = win_minus_loss_rate(0, 8, 0)
    assert [alike.mean, alike.low, alike.high] == pytest.approx([0.0, -0.1959964, 0.1959964])
    with pytest.raises(ValueError, match="at least one prompt"):
        win_minus_loss_rate(0, 0, 0)


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_win_minus_lose_interval_contains_the_estimate(n):
    for wins, defeats in product(range(n + 1), repeat=2):
        if wins + defeats <= n:
            found = win_minus_loss_rate(wins, n - wins - defeats, defeats)
            assert -1.0 <= found.low <= found.mean <= found.high <= 1.0
            assert found.low < found.high


@pytest.mark.parametrize(("n", "least"), [(5, 0.83), (30, 0.91)])
def test_win_minus_lose_interval_covers_at_its_level(n, least):
    """Exactly, over all that n prompts can come to: 95% over shares of wins and defeats, and hardly less at any."""
    outcomes = np.array([(w, n - w - d, d) for w, d in product(range(n + 1), repeat=2) if w + d <= n])
    found = [win_minus_loss_rate(*map(int, one)) for one in outcomes]
    low, high = np.array([one.low for one in found]), np.array([one.high for one in found])
    shares = np.linspace(0.0, 1.0, 21)
    covered = []
    for win, lose in product(shares, repeat=2):
        if win + lose <= 1.0 + 1e-9:
            shown = np.array([win, max(0.0, 1.0 - win - lose), lose])
            chances = multinomial(n, shown / shown.sum()).pmf(outcomes)
            covered.append(chances[(low <= win - lose + 1e-9) & (win - lose - 1e-9 <= high)].sum())
    assert np.mean(covered) == pytest.approx(0.95, abs=0.002)
    assert min(covered) > least
