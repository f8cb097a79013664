"""Win rates of two arms on the same prompts, with tests and confidence intervals."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64
from scipy.special import bdtr, expit

from mixpo.algorithms.intervals import Interval, wilson_interval

MIN_DECIDED = 10
"""Minimum number of wins and defeats for a length-controlled win rate, whose standard error is asymptotic."""


def compute_sign_test_p_value(wins: int, defeats: int) -> float:
    """Exact two-sided p-value of the sign test that wins and defeats are equally likely; 1 if there are neither."""
    return min(1.0, 2.0 * float(bdtr(min(wins, defeats), wins + defeats, 0.5))) if wins + defeats else 1.0


def win_minus_loss_rate(wins: int | float, ties: int | float, defeats: int | float, *, level: float = 0.95) -> Interval:
    """Win rate minus loss rate with the adjusted Wald interval for matched pairs of Agresti and Min (2005).

    1/2 is added to each of the four cells of the table of matched pairs: 1/2 to wins, 1/2 to defeats and 1 to ties. The
    interval is (w - d) / n -+ z sqrt(w + d - (w - d)^2 / n) / n, within [-1, 1]. Counts may be fractional (a prompt
    whose judges disagree); the interval is then conservative. Raises ValueError without prompts.
    """
    if wins + ties + defeats <= 0:
        raise ValueError("a difference of shares needs at least one prompt")
    n, decided, lead = wins + ties + defeats + 2.0, wins + defeats + 1.0, wins - defeats
    half = NormalDist().inv_cdf(0.5 + level / 2.0) * (decided - lead * lead / n) ** 0.5 / n
    return Interval(lead / (n - 2.0), max(-1.0, lead / n - half), min(1.0, lead / n + half))


@dataclass(frozen=True)
class PreferenceShares:
    """Shares of prompts on which the first of two arms wins, ties or loses, with 95% intervals over prompts."""

    prompts: int
    win: Interval
    tie: Interval
    lose: Interval
    difference: Interval
    """Win minus lose."""
    p: float
    """P-value of no difference, by the sign test over prompts on which one arm is preferred more often."""


def estimate_preference_shares(
    wins: int | float, ties: int | float, defeats: int | float, *, won: int, lost: int
) -> PreferenceShares:
    """Shares of wins, ties and defeats, which may be fractional, and p of the numbers of prompts won and lost."""
    prompts = round(wins + ties + defeats)
    win, tie, lose = (wilson_interval(count, prompts) for count in (wins, ties, defeats))
    difference = win_minus_loss_rate(wins, ties, defeats)
    return PreferenceShares(prompts, win, tie, lose, difference, compute_sign_test_p_value(won, lost))


def win_tie_loss_rates(
    scores: Float64[np.ndarray, " n"], other_scores: Float64[np.ndarray, " n"]
) -> tuple[float, float, float]:
    """(win, tie, loss) rates: shares of entries with the score greater than, equal to and less than the opponent's."""
    wins, ties, losses = scores > other_scores, scores == other_scores, scores < other_scores
    return float(wins.mean()), float(ties.mean()), float(losses.mean())


def length_controlled_win_rate(
    outcomes: Float64[np.ndarray, " n"], length_differences: Float64[np.ndarray, " n"]
) -> Interval | None:
    """Length-controlled win rate with its 95% interval (Dubois et al. 2024, without their prompt difficulty).

    sigma(theta) of the logistic regression sigma(theta + phi tanh(d / sd(d))) of `outcomes` (1, a tie 0.5, a defeat 0)
    on the length difference d = `length_differences`, by which the first completion is longer. Standard errors are
    robust, because ties are not binary, and scaled by sqrt(n / (n - 2)) for two fitted parameters. None if there are
    fewer than `MIN_DECIDED` wins and defeats, if d does not vary, or if a length separates wins from defeats, so that
    the maximum likelihood estimate does not exist (Albert and Anderson 1984).
    """
    won, lost = length_differences[outcomes > 0.0], length_differences[outcomes < 1.0]
    separated = won.size == 0 or lost.size == 0 or won.min() >= lost.max() or won.max() <= lost.min()
    if separated or (outcomes != 0.5).sum() < MIN_DECIDED or length_differences.min() == length_differences.max():
        return None
    from statsmodels.genmod.families import Binomial  # slow to import
    from statsmodels.genmod.generalized_linear_model import GLM

    lengths = np.tanh(length_differences / length_differences.std())
    fit = GLM(outcomes, np.column_stack([np.ones_like(lengths), lengths]), family=Binomial()).fit(cov_type="HC0")
    if not fit.converged:
        return None
    half = NormalDist().inv_cdf(0.975) * fit.bse[0] * (len(outcomes) / (len(outcomes) - 2)) ** 0.5
    return Interval(*(float(expit(fit.params[0] + shift)) for shift in (0.0, -half, half)))
