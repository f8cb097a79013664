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
    """Bradley-Terry loss per pair, -log sigmoid(chosen - rejected) (equation 1 of the paper; Bradley, Terry 1952)."""
    _require_same_shape(chosen_scores, rejected_scores)
    return -logsigmoid(chosen_scores - rejected_scores)


def centering_loss(
    chosen_scores: Float[Tensor, " pairs"], rejected_scores: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """Regularizer (chosen + rejected)^2 per pair that centers scores at 0 (Eisenstein et al. 2023, section 2)."""
    _require_same_shape(chosen_scores, rejected_scores)
    return (chosen_scores + rejected_scores) ** 2


def fit_bradley_terry(feature_differences: Float[Tensor, "pairs width"], *, ridge: float) -> Float[Tensor, " width"]:
    """Fit a linear Bradley-Terry model: the weights w that minimise mean -log sigmoid(x @ w) + ridge/2 |s w|^2.

    The rows x of `feature_differences` are features of chosen - rejected, s the standard deviations of the columns, so
    that their scale does not matter; a constant column gets weight 0. The loss is convex. Raises ValueError if ridge is
    not positive, since separable pairs then have no minimum.
    """
    if ridge <= 0:
        raise ValueError(f"expected a ridge above 0, found {ridge}")
    x = feature_differences.double().numpy()
    scale = x.std(axis=0)
    varies = scale > 0
    x = x[:, varies] / scale[varies]

    def compute_ridge_loss_and_gradient(weights: Vector) -> tuple[float, Vector]:
        """Regularized loss at these weights, and its gradient."""
        margins = x @ weights
        value = np.logaddexp(0.0, -margins).mean() + ridge / 2 * weights @ weights
        return float(value), ridge * weights - x.T @ expit(-margins) / len(x)

    weights = np.zeros_like(scale)
    result = minimize(
        compute_ridge_loss_and_gradient,
        np.zeros(x.shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": 1e-8, "ftol": 0.0},
    )
    weights[varies] = result.x / scale[varies]
    return torch.from_numpy(weights).to(feature_differences.dtype)


def implicit_rewards(
    policy_logprobs: Float[Tensor, " pairs"], reference_logprobs: Float[Tensor, " pairs"], *, beta: float
) -> Float[Tensor, " pairs"]:
    """Implicit rewards of a policy, beta * log(pi(y|x) / pi_ref(y|x)) (Rafailov et al. 2023, section 4)."""
    _require_same_shape(policy_logprobs, reference_logprobs)
    return beta * (policy_logprobs - reference_logprobs)


def dpo_loss(
    policy_chosen_logprobs: Float[Tensor, " pairs"],
    policy_rejected_logprobs: Float[Tensor, " pairs"],
    reference_chosen_logprobs: Float[Tensor, " pairs"],
    reference_rejected_logprobs: Float[Tensor, " pairs"],
    *,
    beta: float,
) -> Float[Tensor, " pairs"]:
    """DPO loss per pair, -log sigmoid(implicit reward of chosen - that of rejected) (equation 2 of the paper).

    All four arguments are log-probs in nats, summed over a completion's tokens with its end token. The loss is log 2 if
    the policy equals the reference. Raises ValueError on unequal shapes, which would broadcast.
    """
    return bradley_terry_loss(
        implicit_rewards(policy_chosen_logprobs, reference_chosen_logprobs, beta=beta),
        implicit_rewards(policy_rejected_logprobs, reference_rejected_logprobs, beta=beta),
    )


def dpo_gradients(
    chosen_log_ratio: Float64[Tensor, ""], rejected_log_ratio: Float64[Tensor, ""], *, beta: float
) -> tuple[float, float]:
    """(dL/dx_w, dL/dx_l) of one pair's DPO loss by autograd; x = pi / pi_ref of the chosen and rejected completion.

    Theorem 1 of the paper (Feng et al. 2024) gives them in closed form: -beta x_l^beta / (x_w (x_w^beta + x_l^beta))
    and beta x_l^(beta - 1) / (x_w^beta + x_l^beta), with the ratio x_l / x_w (Corollary 1).
    """
    x = [log_x.detach().exp().requires_grad_() for log_x in (chosen_log_ratio, rejected_log_ratio)]
    zero = torch.zeros(1, dtype=torch.float64)
    loss = dpo_loss(x[0].log()[None], x[1].log()[None], zero, zero, beta=beta).sum()
    by_chosen, by_rejected = torch.autograd.grad(loss, x)
    return float(by_chosen), float(by_rejected)


def _require_same_shape(first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless two tensors have the same shape."""
    if first.shape != second.shape:
        raise ValueError(f"expected equal shapes, found {list(first.shape)} and {list(second.shape)}")
