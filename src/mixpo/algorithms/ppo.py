"""What PPO computes on a rollout: rewards, advantages, losses. Schulman et al. 2016, 2017; Ziegler et al. 2019.

The last dimension is a completion's tokens; its mask is true from the first to the last one, the end token included,
then false.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixpo.algorithms.kl import kl_k1


def shaped_rewards(
    logprobs: Float[Tensor, "*batch tokens"],
    reference_logprobs: Float[Tensor, "*batch tokens"],
    mask: Bool[Tensor, "*batch tokens"],
    scores: Float[Tensor, "*batch"],
    *,
    kl_coef: float,
    score_clip: float | None,
    penalties: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch tokens"]:
    """Per token -kl_coef * (log pi - log pi_ref), plus the score, clipped to +-score_clip, on the last true token.

    `penalties` are taken off the clipped scores. In reward units; 0 where the mask is false. Raises ValueError on a row
    whose mask is empty or has holes.
    """
    lengths = mask.sum(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()) or not bool((mask == (_positions(mask) < lengths)).all()):
        raise ValueError("every row's mask must be true from the first token to the last one, and then false")
    clipped = scores if score_clip is None else scores.clamp(-score_clip, score_clip)
    if penalties is not None:
        clipped = clipped - penalties
    rewards = (-kl_coef * kl_k1(logprobs, reference_logprobs)).masked_fill(~mask, 0.0)
    return rewards.scatter_add(-1, lengths - 1, clipped[..., None])


def generalized_advantages(
    rewards: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens"],
    mask: Bool[Tensor, "*batch tokens"],
    *,
    discount: float,
    gae_lambda: float,
) -> Float[Tensor, "*batch tokens"]:
    """Advantages by generalised advantage estimation. Schulman et al. 2016, equation 16.

    A_t = sum_l (discount * gae_lambda)^l delta_{t+l}, delta_t = r_t + discount * V_{t+1} - V_t. In reward units; 0
    where the mask is false. A completion ends at its last true token: nothing is bootstrapped past it, and padding is
    not run over (DeepSpeed-Chat's is).
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[..., 0])
    next_advantage = torch.zeros_like(rewards[..., 0])
    for token in reversed(range(rewards.shape[-1])):
        delta = rewards[..., token] + discount * next_value - values[..., token]
        advantage = delta + discount * gae_lambda * next_advantage
        next_advantage = advantage.masked_fill(~mask[..., token], 0.0)
        next_value = values[..., token].masked_fill(~mask[..., token], 0.0)
        advantages[..., token] = next_advantage
    return advantages


def rloo_advantages(rewards: Float[Tensor, "prompts k"]) -> Float[Tensor, "prompts k"]:
    """Each completion's reward minus the mean reward of the other k - 1 of its prompt. Ahmadian et al. 2024, eq. 8.

    `rewards` are of whole completions, KL penalty included. Raises ValueError for k < 2.
    """
    k = _group_size(rewards)
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (k / (k - 1))


def grpo_advantages(rewards: Float[Tensor, "prompts k"]) -> Float[Tensor, "prompts k"]:
    """Each completion's reward, shifted and scaled by mean and deviation of its prompt's k. Shao et al. 2024.

    Sample standard deviation, plus 1e-4 so that equal rewards give 0. Differs from the paper: `rewards` include the
    KL penalty, which there is a term of the loss. Raises ValueError for k < 2.
    """
    _group_size(rewards)
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)


def policy_loss(
    logprobs: Float[Tensor, "*batch tokens"],
    old_logprobs: Float[Tensor, "*batch tokens"],
    advantages: Float[Tensor, "*batch tokens"],
    *,
    clip: float,
) -> Float[Tensor, "*batch tokens"]:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = pi / pi_old, a token each. Schulman et al. 2017, eq. 7.

    Finite wherever both log-probs are; what stands outside a mask must be finite too, since it is only multiplied by 0.
    """
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip, 1.0 + clip))


def clip_fraction(
    logprobs: Float[Tensor, "*batch tokens"],
    old_logprobs: Float[Tensor, "*batch tokens"],
    advantages: Float[Tensor, "*batch tokens"],
    mask: Bool[Tensor, "*batch tokens"],
    *,
    clip: float,
) -> Float[Tensor, ""]:
    """The share of the mask's tokens whose gradient the clip stops: ratio too high and A > 0, or too low and A < 0."""
    ratio = (logprobs - old_logprobs).exp()
    stopped = ((ratio > 1.0 + clip) & (advantages > 0)) | ((ratio < 1.0 - clip) & (advantages < 0))
    return stopped[mask].to(logprobs.dtype).mean()


def value_loss(
    values: Float[Tensor, "*batch tokens"],
    old_values: Float[Tensor, "*batch tokens"],
    returns: Float[Tensor, "*batch tokens"],
    *,
    clip: float | None,
) -> Float[Tensor, "*batch tokens"]:
    """Half the squared error, or that of the value kept within +-clip of the old one if it is larger, a token each."""
    error = (values - returns) ** 2
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns) ** 2)
    return 0.5 * error


def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is perfect, 0 what a constant has; 0 if Var is 0."""
    spread = returns[mask].var(correction=0)
    if float(spread) == 0.0:
        return torch.zeros_like(spread)
    return 1.0 - (returns - values)[mask].var(correction=0) / spread


def _positions(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[-1], device=mask.device)


def _group_size(rewards: Tensor) -> int:
    if rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 completions to compare, found {rewards.shape[1]}")
    return rewards.shape[1]
