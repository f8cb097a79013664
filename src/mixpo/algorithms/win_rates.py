"""Wins, ties and losses of two arms on the same prompts."""

from statistics import NormalDist

import numpy as np
from jaxtyping import Float64
from scipy.special import bdtr, expit

from mixpo.algorithms.intervals import Interval

FEWEST_DECIDED = 10
"""Wins and defeats from which a win rate at equal length is told: its errors are those of many."""


def sign_test(wins: int, defeats: int) -> float:
    """The exact two-sided p of "a win is as likely as a defeat"; ties tell nothing, and without either it is 1."""
    return min(1.0, 2.0 * float(bdtr(min(wins, defeats), wins + defeats, 0.5))) if wins + defeats else 1.0


def win_minus_lose(wins: int | float, ties: int | float, defeats: int | float, *, level: float = 0.95) -> Interval:
    """The share of wins minus that of defeats, with an interval that is honest for few prompts too.

    Agresti and Min 2005: 1/2 is added to each cell of the table of matched pairs, so 1/2 to wins and to defeats and 1
    to ties, which are two of its cells; then it is Wald's, (w - d) / n -+ z sqrt(w + d - (w - d)^2 / n) / n, within
    [-1, 1]. A prompt may count in parts, as where its judges differ: then it is rather too wide. Raises ValueError
    without prompts.
    """
    if wins + ties + defeats <= 0:
        raise ValueError("a difference of shares needs at least one prompt")
    n, decided, lead = wins + ties + defeats + 2.0, wins + defeats + 1.0, wins - defeats
    half = NormalDist().inv_cdf(0.5 + level / 2.0) * (decided - lead * lead / n) ** 0.5 / n
    return Interval(lead / (n - 2.0), max(-1.0, lead / n - half), min(1.0, lead / n + half))


def win_tie_lose(one: Float64[np.ndarray, " n"], other: Float64[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Shares of places at which `one` is greater than, equal to, and less than `other`. They sum to 1."""
    return float((one > other).mean()), float((one == other).mean()), float((one < other).mean())


def length_controlled_win_rate(wins: Float64[np.ndarray, " n"], longer: Float64[np.ndarray, " n"]) -> Interval | None:
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
