"""The models of PPO: what is trained, and what is frozen."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from mixpo.data.errors import InputError
from mixpo.models.adapters import add_lora, freeze
from mixpo.models.digests import model_digest
from mixpo.models.language_model import LanguageModel, Precision
from mixpo.models.loading import load_policy, load_reward_model, new_reward_model
from mixpo.models.tokenizers import tokenize_alike
from mixpo.stages.ppo_settings import PPOSettings
from mixpo.stages.stage import model_folder
from mixpo.training.checkpoint import Stateful, TrainableWeights
from mixpo.training.step import make_optimizer


class Where(TypedDict):
    """Where and how a model is loaded."""

    device: torch.device
    precision: Precision


@dataclass(frozen=True)
class FrozenModels:
    """The models that completions are scored and compared with."""

    reference: LanguageModel
    sft: LanguageModel
    """The same object as the reference where the reference is SFT."""
    reward: LanguageModel


@dataclass
class ActorCritic:
    """The policy, and with `gae` a value model, with their optimizers and the coefficient of the KL penalty."""

    policy: LanguageModel
    policy_optimizer: torch.optim.Optimizer
    value: LanguageModel | None
    """The policy itself where it has a value head of its own."""
    value_optimizer: torch.optim.Optimizer | None
    kl_coef: float
    kl_multiplier: float = 1.0
    """Multiplies kl_coef; changed by the controller of kl_budget."""
    kl_error_sum: float = 0.0
    """The integral term of that controller."""

    @property
    def shares_model(self) -> bool:
        """Whether policy and value are one model."""
        return self.value is self.policy

    def stateful_parts(self) -> dict[str, Stateful]:
        """Return what a checkpoint holds of it."""
        parts: dict[str, Stateful] = {
            "policy": TrainableWeights(self.policy),
            "policy_optimizer": self.policy_optimizer,
        }
        if self.value is not None and self.value_optimizer is not None:
            parts |= {"value": TrainableWeights(self.value), "value_optimizer": self.value_optimizer}
        return parts


def load_frozen_models(settings: PPOSettings, inputs: Mapping[str, Path], policy: LanguageModel) -> FrozenModels:
    """Load reference, SFT and reward model; SFT once where it is the reference.

    Raises `InputError` if reference or SFT have another tokenizer than the policy.
    """
    where = Where(device=policy.device, precision=settings.precision)
    reference_folder, sft_folder = model_folder(inputs["reference"]), model_folder(inputs["sft"])
    reference = sft = freeze(load_policy(reference_folder, **where))
    if model_digest(reference_folder) != model_digest(sft_folder):
        sft = freeze(load_policy(sft_folder, **where))
    for name, model in (("reference", reference), ("sft", sft)):
        if not tokenize_alike(model.tokenizer, policy.tokenizer):
            raise InputError(f"ppo.{name}: its tokenizer differs from the policy's; expected the same tokens in both")
    return FrozenModels(reference, sft, freeze(load_reward_model(model_folder(inputs["reward"]), **where)))


def make_actor_critic(
    settings: PPOSettings, inputs: Mapping[str, Path], policy: LanguageModel, reward: LanguageModel
) -> ActorCritic:
    """Make the optimizers, and the value model if the advantage needs one (`value_init`)."""
    value: LanguageModel | None = None
    where = Where(device=policy.device, precision=settings.precision)
    if settings.advantage == "gae":
        if settings.value_init == "shared":
            value = policy
            policy.value_head = _zero_head(policy)
        elif settings.value_init == "policy":
            value = new_reward_model(model_folder(inputs["policy"]), seed=settings.seed, **where)
        else:
            if not tokenize_alike(reward.tokenizer, policy.tokenizer):
                raise InputError(
                    "ppo.value_init: found `reward`, but the reward model has another tokenizer than the policy; "
                    "expected the same tokens in both; set ppo.value_init: policy"
                )
            value = load_reward_model(model_folder(inputs["reward"]), **where)
    value_optimizer = None
    if value is not None and value is not policy:
        if settings.lora:
            add_lora(value, settings.lora)
        value_settings = settings.model_copy(update={"learning_rate": settings.value_learning_rate})
        value_optimizer = make_optimizer(value.parameters(), value_settings)
    return ActorCritic(policy, make_optimizer(policy.parameters(), settings), value, value_optimizer, settings.kl_coef)


def _zero_head(policy: LanguageModel) -> nn.Linear:
    """Make a scalar head whose values are 0 at first."""
    head = nn.Linear(policy.model.config.get_text_config().hidden_size, 1).to(policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
