"""KL metrics of PPO's completions, and the checks on them."""

import math
from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from mixpo.algorithms.kl import kl_k1, kl_k3
from mixpo.algorithms.masked import masked_mean
from mixpo.data.errors import InputError
from mixpo.stages.ppo_settings import PPOSettings
from mixpo.training.step import Diverged

STEP_0_KL = {"float32": 1e-3, "bfloat16": 0.1}
"""Most nats a token of |log pi - log pi_ref| at step 0 if the policy starts as its own reference."""


def compute_kl_metrics(
    logprobs: Float[Tensor, "prompts k tokens"],
    reference_logprobs: Float[Tensor, "prompts k tokens"],
    sft_logprobs: Float[Tensor, "prompts k tokens"],
    mask: Bool[Tensor, "prompts k tokens"],
) -> dict[str, float]:
    """KL of a batch of completions to the reference and to SFT as metrics: nats a completion, nats a token."""
    kl = kl_k1(logprobs, reference_logprobs) * mask
    return {
        "kl": float(kl.sum(dim=-1).mean()),
        "kl_per_token": float(masked_mean(kl, mask)),
        "kl_k3": float((kl_k3(logprobs, reference_logprobs) * mask).sum(dim=-1).mean()),
        "kl_abs_per_token": float(masked_mean(kl.abs(), mask)),
        "kl_from_sft": float((kl_k1(logprobs, sft_logprobs) * mask).sum(dim=-1).mean()),
    }


def compute_sampler_mismatch(
    logprobs: Float[Tensor, "prompts k tokens"],
    sampler_logprobs: Float[Tensor, "prompts k tokens"],
    mask: Bool[Tensor, "prompts k tokens"],
) -> dict[str, float]:
    """How far another engine's log-probs of its own draws are from the policy's, as metrics.

    `sampler_kl` is the KL from engine to policy in nats a token, `sampler_max_ratio` the largest ratio of both
    probabilities of a token.
    """
    difference = (logprobs - sampler_logprobs)[mask].abs()
    return {
        "sampler_kl": float(masked_mean(kl_k3(sampler_logprobs, logprobs), mask)),
        "sampler_max_ratio": float(difference.max().exp()),
    }


def check_kl_limits(
    settings: PPOSettings, metrics: Mapping[str, float], *, iteration: int, starts_at_reference: bool
) -> None:
    """Raise an error if the KL exceeds `max_kl`, or at step 0 if it is not 0 though the policy is its reference."""
    if iteration == 0 and starts_at_reference and metrics["kl_abs_per_token"] > STEP_0_KL[settings.precision]:
        raise RuntimeError(
            f"step 1: found log-probs of policy and reference that differ by {metrics['kl_abs_per_token']:.3g} nats a "
            f"token, though both are the same model; expected at most {STEP_0_KL[settings.precision]}"
        )
    if not math.isfinite(metrics["kl_per_token"]) or metrics["kl_per_token"] > settings.max_kl:
        if iteration == 0:
            raise InputError(
                f"ppo.max_kl: the policy starts {metrics['kl_per_token']:.3g} nats a token from its reference; "
                f"expected at most {settings.max_kl:g}; raise it, or name a reference that is nearer"
            )
        raise Diverged(
            f"the KL to the reference ran away: {metrics['kl_per_token']:.3g} nats a token, more than "
            f"max_kl = {settings.max_kl:g}"
        )
