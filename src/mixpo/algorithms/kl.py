"""Estimators of the KL divergence between policy and reference, and the controllers of its coefficient."""

import math

from jaxtyping import Float
from torch import Tensor


def kl_k1(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """KL estimator k1 per sampled token, log pi - log pi_ref in nats: unbiased, may be negative (Schulman 2020).

    Its sum over a completion, averaged over completions of the policy, estimates KL(pi || pi_ref).
    """
    return logprobs - reference_logprobs


def kl_k3(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """KL estimator k3 per sampled token, r - 1 - log r with r = pi_ref / pi, in nats (Schulman 2020).

    Unbiased, never negative, with a lower variance than k1 near 0. Only logged: PPO trains on k1.
    """
    log_ratio = reference_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def kl_bound_of_best_of_n(n: int) -> float:
    """Upper bound of the KL of best-of-n sampling from the base policy, log n - (n - 1) / n nats (Beirami 2024)."""
    return math.log(n) - (n - 1) / n


def adapt_kl_coef(kl_coef: float, kl: float, *, target_kl: float, rate: float = 0.1) -> float:
    """Next KL coefficient, kl_coef * (1 + rate * clip(kl / target_kl - 1, -0.2, 0.2)) (Ziegler et al. 2019)."""
    return kl_coef * (1.0 + rate * min(max(kl / target_kl - 1.0, -0.2), 0.2))


def update_kl_budget_controller(error_sum: float, kl_from_sft: float, *, budget: float) -> tuple[float, float]:
    """PI controller that keeps the KL from SFT at a budget: returns (multiplier of kl_coef, new error sum).

    The multiplier is exp(3 e + sum of e / 2) with e = log(kl_from_sft / budget), clipped to +-1/2. An error clipped
    from below counts a tenth in the sum, which prevents integral windup while the KL rises from 0 to the budget.
    """
    error = math.log(max(kl_from_sft, 1e-9) / budget)
    clipped = min(max(error, -0.5), 0.5)
    error_sum += clipped if error > -0.5 else 0.1 * clipped
    return math.exp(3.0 * clipped + 0.5 * error_sum), error_sum


def compute_sft_anchor_weight(kl_multiplier: float) -> float:
    """Weight w = max(0, 1 - 1 / multiplier) of SFT in the KL anchor log pi = (1 - w) log pi_ref + w log pi_SFT.

    With the coefficient kl_coef * m, m the multiplier, the penalty is then kl_coef * min(1, m) times the KL to the
    reference plus kl_coef * max(0, m - 1) times the KL to SFT: a multiplier below 1 weakens the pull to the reference,
    and one above 1 adds a pull to SFT.
    """
    return max(0.0, 1.0 - 1.0 / kl_multiplier)
