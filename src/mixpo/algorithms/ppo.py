"""PPO rewards, advantages, losses and metrics on a rollout (Schulman et al. 2016, 2017; Ziegler et al. 2019).

The last dimension is a completion's tokens; its mask is true up to the last one, the end token included, then false.
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
    """PPO rewards per token: -kl_coef * (log pi - log pi_ref), plus the score at the last token.

    Scores are clipped to +-score_clip, then `penalties` are subtracted. 0 where the mask is false. Raises ValueError on
    a row whose mask is empty or has gaps.
    """
    lengths, positions = mask.sum(dim=-1, keepdim=True), torch.arange(mask.shape[-1], device=mask.device)
    if not bool((lengths > 0).all()) or not bool((mask == (positions < lengths)).all()):
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
    """Advantages per token by generalised advantage estimation, GAE (Schulman et al. 2016, equation 16).

    A_t = sum_l (discount * gae_lambda)^l delta_{t+l}, delta_t = r_t + discount * V_{t+1} - V_t. In reward units; 0
    where the mask is false. The value after a completion's last true token is 0, and padding does not contribute
    (unlike in DeepSpeed-Chat).
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


def rloo_advantages(completion_rewards: Float[Tensor, "prompts k"]) -> Float[Tensor, "prompts k"]:
    """RLOO advantages: completion's reward minus the mean of the prompt's others (Ahmadian et al. 2024, eq. 8)."""
    k = _get_group_size(completion_rewards)
    return (completion_rewards - completion_rewards.mean(dim=1, keepdim=True)) * (k / (k - 1))


def grpo_advantages(completion_rewards: Float[Tensor, "prompts k"]) -> Float[Tensor, "prompts k"]:
    """GRPO advantages: rewards standardized by mean and deviation over the prompt's k completions (Shao et al. 2024).

    The sample standard deviation plus 1e-4, so that equal rewards give 0. Unlike in the paper, `completion_rewards`
    include the KL penalty, which is a term of the loss there. Raises ValueError for k < 2.
    """
    _get_group_size(completion_rewards)
    deviation = completion_rewards.std(dim=1, keepdim=True)
    return (completion_rewards - completion_rewards.mean(dim=1, keepdim=True)) / (deviation + 1e-4)


def policy_loss(
    logprobs: Float[Tensor, "*batch tokens"],
    old_logprobs: Float[Tensor, "*batch tokens"],
    advantages: Float[Tensor, "*batch tokens"],
    *,
    clip: float,
) -> Float[Tensor, "*batch tokens"]:
    """Clipped PPO policy loss per token (Schulman et al. 2017, equation 7).

    max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = pi / pi_old.
    Inputs must be finite outside the mask too, because the caller multiplies by it.
    """
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip, 1.0 + clip))


def truncated_importance_weights(
    logprobs: Float[Tensor, "*shape"], sampler_logprobs: Float[Tensor, "*shape"], *, clip: float
) -> Float[Tensor, "*shape"]:
    """Truncated importance weights per token, min(pi / pi_sampler, clip) (Ionides 2008; Yao et al. 2025).

    pi is the policy before the update, as the trainer computes it, and pi_sampler the engine that drew the tokens,
    whose rounding is another. The weights multiply the policy loss.
    """
    return (logprobs - sampler_logprobs).exp().clamp(max=clip)


def clip_fraction(
    logprobs: Float[Tensor, "*batch tokens"],
    old_logprobs: Float[Tensor, "*batch tokens"],
    advantages: Float[Tensor, "*batch tokens"],
    mask: Bool[Tensor, "*batch tokens"],
    *,
    clip: float,
) -> Float[Tensor, ""]:
    """Share of tokens with a gradient clipped to 0: ratio > 1 + clip and A > 0, or ratio < 1 - clip and A < 0."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ((ratio > 1.0 + clip) & (advantages > 0)) | ((ratio < 1.0 - clip) & (advantages < 0))
    return clipped[mask].to(logprobs.dtype).mean()


def value_loss(
    values: Float[Tensor, "*batch tokens"],
    old_values: Float[Tensor, "*batch tokens"],
    returns: Float[Tensor, "*batch tokens"],
    *,
    clip: float | None,
) -> Float[Tensor, "*batch tokens"]:
    """Value loss per token: half the squared error, or that of the value clipped to old value +-clip if larger."""
    error = (values - returns) ** 2
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error


def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Explained variance 1 - Var(returns - values) / Var(returns) over the mask, at most 1; 0 for constant returns."""
    variance = returns[mask].var(correction=0)
    if float(variance) == 0.0:
        return torch.zeros_like(variance)
    return 1.0 - (returns - values)[mask].var(correction=0) / variance


def _get_group_size(completion_rewards: Tensor) -> int:
    """Number k of completions per prompt. Raises ValueError if it is less than 2."""
    if completion_rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 completions to compare, found {completion_rewards.shape[1]}")
    return completion_rewards.shape[1]
