"""Losses on preference pairs: Bradley-Terry and DPO."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


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


def _same_shape(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"expected equal shapes, found {list(one.shape)} and {list(other.shape)}")
