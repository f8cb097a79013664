"""Estimators of the KL divergence between policy and reference, and the controllers of its coefficient."""

import math

from jaxtyping import Float
from torch import Tensor


def kl_k1(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log pi - log pi_ref of tokens drawn from pi, in nats: unbiased, and negative for single tokens (Schulman 2020).

    Summed over a completion and averaged over completions of the policy it estimates KL(pi || pi_ref).
    """
    return logprobs - reference_logprobs


def kl_k3(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """r - 1 - log r with r = pi_ref / pi, in nats: unbiased, never negative, of lower variance near 0 (Schulman 2020).

    For reading only; what PPO trains on is k1.
    """
    log_ratio = reference_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def kl_of_best_of(n: int) -> float:
    """KL of the best of n samples from their sampler, in nats: log n - (n - 1) / n, an upper bound (Beirami 2024)."""
    return math.log(n) - (n - 1) / n


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, rate: float = 0.1) -> float:
    """The coefficient for the next iteration: raised where the KL exceeds its target. Ziegler et al. 2019, section 2.2.

    kl_coef * (1 + rate * clip(kl / target - 1, -0.2, 0.2)).
    """
    return kl_coef * (1.0 + rate * min(max(kl / target - 1.0, -0.2), 0.2))


def control_kl_budget(total: float, kl_from_sft: float, *, budget: float) -> tuple[float, float]:
    """The multiplier of kl_coef for the next iteration, and the sum of errors so far: a controller of the KL from SFT.

    exp(3 e + sum of e / 2) with e = log(kl_from_sft / budget), cut to +-1/2: proportional and integral, in the log of
    the KL. An error cut from below counts a tenth in the sum, so that the way from 0 to the budget does not wind it up.
    """
    error = math.log(max(kl_from_sft, 1e-9) / budget)
    cut = min(max(error, -0.5), 0.5)
    total += cut if error > -0.5 else 0.1 * cut
    return math.exp(3.0 * cut + 0.5 * total), total


def compute_sft_weight(multiplier: float) -> float:
    """How far the anchor is moved from the reference to SFT: max(0, 1 - 1 / multiplier).

    log pi_anchor = (1 - w) log pi_ref + w log pi_SFT at the coefficient kl_coef * multiplier is the penalty
    kl_coef * min(1, m) on the KL to the reference plus kl_coef * max(0, m - 1) on the KL to SFT: up to 1 the multiplier
    loosens the anchor, beyond it pulls to SFT, whatever the reference is.
    """
    return max(0.0, 1.0 - 1.0 / multiplier)
