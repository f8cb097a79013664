"""The win rate at equal length: against Newton's method written from the formula, and where it cannot be told."""

import math

import numpy as np
import pytest

from mixpo.algorithms.win_rates import length_controlled_win_rate


def sample_wins(theta: float, phi: float, *, n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Wins, ties and defeats of a judge that likes arm and length so much."""
    generator = np.random.default_rng(seed)
    longer = np.round(generator.normal(20.0, 50.0, size=n))
    odds = theta + phi * np.tanh(longer / longer.std())
    wins = (generator.random(n) < 1 / (1 + np.exp(-odds))).astype(np.float64)
    wins[generator.random(n) < 0.2] = 0.5
    return wins, longer


def fit_by_newton(wins: np.ndarray, longer: np.ndarray) -> tuple[float, float]:
    """theta and its sandwich error, one row after another."""
    mean = sum(longer) / len(longer)
    spread = math.sqrt(sum((d - mean) ** 2 for d in longer) / len(longer))
    rows = [np.array([1.0, math.tanh(d / spread)]) for d in longer]
    best = np.zeros(2)
    for _ in range(50):
        gradient, bread, meat = np.zeros(2), np.zeros((2, 2)), np.zeros((2, 2))
        for row, win in zip(rows, wins, strict=True):
            p = 1 / (1 + math.exp(-float(row @ best)))
            gradient += (win - p) * row
            bread += p * (1 - p) * np.outer(row, row)
            meat += (win - p) ** 2 * np.outer(row, row)
        best = best + np.linalg.solve(bread, gradient)
    inverse = np.linalg.inv(bread)
    return best[0], math.sqrt((inverse @ meat @ inverse)[0, 0] * len(wins) / (len(wins) - 2))


@pytest.mark.parametrize(("theta", "phi"), [(0.0, 2.0), (0.7, -1.0), (-0.5, 0.0)])
def test_win_rate_equals_the_regression_at_equal_length(theta, phi):
    wins, longer = sample_wins(theta, phi)
    found = length_controlled_win_rate(wins, longer)
    best, error = fit_by_newton(wins, longer)
    expected = [1 / (1 + math.exp(-(best + shift * 1.959964 * error))) for shift in (0, -1, 1)]
    assert [found.mean, found.low, found.high] == pytest.approx(expected, rel=1e-5)


def test_judging_by_length_alone_gives_a_rate_of_one_half():
    wins, longer = sample_wins(0.0, 2.0, n=4_000)
    found = length_controlled_win_rate(wins, longer)
    assert wins.mean() > 0.55
    assert found.low < 0.5 < found.high


@pytest.mark.parametrize(
    ("wins", "longer"),  # three times over: twelve prompts
    [
        ([1, 0, 1, 0], [3, 3, 3, 3]),  # as long as each other, or longer by the same
        ([1, 0, 1, 0], [0, 0, 0, 0]),
        ([1, 1, 1, 1], [1, 2, 3, 4]),
        ([0, 0, 0, 0], [1, 2, 3, 4]),
        ([0.5, 0.5, 0.5, 0.5], [1, 2, 3, 4]),
        ([0, 0, 1, 1], [1, 2, 3, 4]),  # the longer always wins
        ([1, 1, 0, 0], [1, 2, 3, 4]),
        ([0, 0.5, 1, 1], [1, 2, 3, 4]),
        ([0, 0, 1, 1], [1, 3, 3, 4]),  # all but at one length
    ],
)
def test_undefined_win_rate_is_none(wins, longer):
    wins, longer = np.array(3 * wins, dtype=np.float64), np.array(3 * longer, dtype=np.float64)
    assert length_controlled_win_rate(wins, longer) is None


def test_one_exception_to_separation_gives_an_estimate():
    parted, longer = np.repeat([0.0, 1.0], 6), np.arange(12.0)
    assert length_controlled_win_rate(parted, longer) is None
    assert length_controlled_win_rate(parted[[*range(5), 6, 5, *range(7, 12)]], longer) is not None


def test_too_few_wins_and_defeats_give_none():
    wins, longer = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]), np.arange(9.0)
    assert length_controlled_win_rate(wins, longer) is None
    assert length_controlled_win_rate(np.array([*wins, 0.5, 0.5, 0.5]), np.arange(12.0)) is None, "ties decide nothing"
    assert length_controlled_win_rate(np.array([*wins, 0.0]), np.arange(10.0)) is not None
