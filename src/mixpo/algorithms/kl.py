"""Estimators of the KL divergence between policy and reference, and the controller of its coefficient."""

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


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, rate: float = 0.1) -> float:
    """The coefficient for the next iteration: raised where the KL exceeds its target. Ziegler et al. 2019, section 2.2.

    kl_coef * (1 + rate * clip(kl / target - 1, -0.2, 0.2)).
    """
    return kl_coef * (1.0 + rate * min(max(kl / target - 1.0, -0.2), 0.2))
