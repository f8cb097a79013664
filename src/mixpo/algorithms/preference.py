"""Losses on preference pairs: Bradley-Terry and DPO."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import logsigmoid

Vector = np.ndarray[Any, np.dtype[np.float64]]


def bradley_terry_loss(
    chosen_scores: Float[Tensor, " pairs"], rejected_scores: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """-log sigmoid(chosen - rejected), a pair each. Equation 1 of the paper; Bradley and Terry 1952.

    Scores are unbounded; adding the same number to both changes nothing. Raises ValueError on unequal shapes.
    """
    _same_shape(chosen_scores, rejected_scores)
    return -logsigmoid(chosen_scores - rejected_scores)


def centering_loss(
    chosen_scores: Float[Tensor, " pairs"], rejected_scores: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """(chosen + rejected)^2, a pair each: draws the scores' mean, which Bradley-Terry leaves open, to 0.

    Eisenstein et al. 2023, section 2. Raises ValueError on unequal shapes.
    """
    _same_shape(chosen_scores, rejected_scores)
    return (chosen_scores + rejected_scores) ** 2


def fit_bradley_terry(differences: Float[Tensor, "pairs width"], *, ridge: float) -> Float[Tensor, " width"]:
    """The weights w that minimise mean -log sigmoid(x @ w) + ridge/2 |s w|^2 over the rows x, chosen - rejected.

    s is the standard deviation of each column, so that its scale does not matter; one that does not vary gets weight 0.
    The loss is convex. Raises ValueError if ridge is not positive, without which separable pairs have no minimum.
    """
    if ridge <= 0:
        raise ValueError(f"expected a ridge above 0, found {ridge}")
    x = differences.double().numpy()
    scale = x.std(axis=0)
    varies = scale > 0
    x = x[:, varies] / scale[varies]

    def loss(weights: Vector) -> tuple[float, Vector]:
        margins = x @ weights
        value = np.logaddexp(0.0, -margins).mean() + ridge / 2 * weights @ weights
        return float(value), ridge * weights - x.T @ expit(-margins) / len(x)

    fitted = np.zeros_like(scale)
    found = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"gtol": 1e-8, "ftol": 0.0})
    fitted[varies] = found.x / scale[varies]
    return torch.from_numpy(fitted).to(differences.dtype)


def implicit_rewards(
    policy_logprobs: Float[Tensor, " pairs"], reference_logprobs: Float[Tensor, " pairs"], *, beta: float
) -> Float[Tensor, " pairs"]:
    """beta * log(pi(y|x) / pi_ref(y|x)): the reward that a policy implies. Rafailov et al. 2023, section 4."""
    _same_shape(policy_logprobs, reference_logprobs)
    return beta * (policy_logprobs - reference_logprobs)


def dpo_loss(
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    *,
    beta: float,
) -> Float[Tensor, " pairs"]:
    """-log sigmoid(implicit reward of chosen - of rejected), a pair each. Equation 2 of the paper.

    All four are sequence log-probs in nats, summed over a completion's tokens with its end token, not averaged.
    Log 2 where the policy equals the reference. Raises ValueError on unequal shapes, which would broadcast.
    """
    return bradley_terry_loss(
        implicit_rewards(policy_chosen, reference_chosen, beta=beta),
        implicit_rewards(policy_rejected, reference_rejected, beta=beta),
    )


def dpo_gradients(
    log_x_chosen: Float64[Tensor, ""], log_x_rejected: Float64[Tensor, ""], *, beta: float
) -> tuple[float, float]:
    """dL/dx_w and dL/dx_l of one pair's DPO loss, x = pi / pi_ref, by automatic differentiation.

    What Theorem 1 of the paper (Feng et al. 2024) gives in closed form: -beta x_l^beta / (x_w (x_w^beta + x_l^beta))
    and beta x_l^(beta - 1) / (x_w^beta + x_l^beta), whose ratio is x_l / x_w (Corollary 1).
    """
    x = [log_x.detach().exp().requires_grad_() for log_x in (log_x_chosen, log_x_rejected)]
    zero = torch.zeros(1, dtype=torch.float64)
    loss = dpo_loss(x[0].log()[None], x[1].log()[None], zero, zero, beta=beta).sum()
    by_chosen, by_rejected = torch.autograd.grad(loss, x)
    return float(by_chosen), float(by_rejected)


def _same_shape(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"expected equal shapes, found {list(one.shape)} and {list(other.shape)}")
