"""Trained and frozen models of PPO."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mixpo.data.errors import InputError
from mixpo.models.digests import compute_model_digest
from mixpo.models.language_model import LanguageModel
from mixpo.stages.ppo_settings import PPOSettings
from mixpo.training.checkpoint import Stateful, TrainableWeights
from mixpo.training.job import StageJob, locate_model_folder
from mixpo.training.step import make_optimizer


@dataclass(frozen=True)
class FrozenModels:
    """Reference, SFT and reward model of PPO, which are not trained."""

    reference: LanguageModel
    sft: LanguageModel
    """The same object as the reference if that is the SFT model."""
    reward: LanguageModel


@dataclass
class ActorCritic:
    """Policy and, with `gae`, value model of PPO, their optimizers, and the state of the KL controllers."""

    policy: LanguageModel
    policy_optimizer: torch.optim.Optimizer
    value: LanguageModel | None
    """The policy itself if it has a value head (`value_init: shared`)."""
    value_optimizer: torch.optim.Optimizer | None
    kl_coef: float
    kl_multiplier: float = 1.0
    """Factor of kl_coef, changed by the controller of kl_budget."""
    kl_error_sum: float = 0.0
    """Integral term of that controller."""

    @property
    def shares_network(self) -> bool:
        """True if policy and value are one network with two heads."""
        return self.value is self.policy

    def collect_checkpoint_parts(self) -> dict[str, Stateful]:
        """The trained weights and optimizers that a checkpoint saves, by name."""
        weights = TrainableWeights(self.policy)
        parts: dict[str, Stateful] = {"policy": weights, "policy_optimizer": self.policy_optimizer}
        if self.value is not None and self.value_optimizer is not None:
            parts |= {"value": TrainableWeights(self.value), "value_optimizer": self.value_optimizer}
        return parts


def load_frozen_models(
    settings: PPOSettings, input_paths: Mapping[str, Path], policy: LanguageModel, job: StageJob
) -> FrozenModels:
    """Load reference, SFT (one object if the same) and reward model. Raises `InputError` if tokenizers differ."""
    digests = [compute_model_digest(locate_model_folder(input_paths[name])) for name in ("reference", "sft")]
    reference = job.load_policy(input_paths["reference"], settings.precision, settings.lora)
    same = digests[0] == digests[1]
    sft = reference if same else job.load_policy(input_paths["sft"], settings.precision, settings.lora)
    for name, model in (("reference", reference), ("sft", sft)):
        if model.tokenization_digest != policy.tokenization_digest:
            raise InputError(f"ppo.{name}: its tokenizer differs from the policy's; expected the same tokens in both")
    reward = job.load_reward_model(input_paths["reward"], settings.precision, settings.lora)
    return FrozenModels(reference, sft, reward)


def make_actor_critic(
    settings: PPOSettings, input_paths: Mapping[str, Path], policy: LanguageModel, reward: LanguageModel, job: StageJob
) -> ActorCritic:
    """Make the optimizers and, for `gae`, the value model from the policy or the reward model, as `value_init` says."""
    value: LanguageModel | None = None
    if settings.advantage == "gae":
        if settings.value_init == "shared":
            value = policy
            policy.network.heads["shared-value"] = _make_zero_value_head(policy)
            if settings.lora is None:  # as what trains beside it
                job.processes.shard(policy.network.heads["shared-value"])
            policy.head = "shared-value"
        elif settings.value_init == "policy":
            value = job.initialize_reward_model(
                input_paths["policy"], seed=settings.seed, precision=settings.precision, lora=settings.lora
            )
        else:
            if reward.tokenization_digest != policy.tokenization_digest:
                raise InputError(
                    "ppo.value_init: found `reward`, but the reward model has another tokenizer than the policy; "
                    "expected the same tokens in both; set ppo.value_init: policy"
                )
            value = job.load_value_model(input_paths["reward"], settings.precision, settings.lora)
    value_optimizer = None
    if value is not None and value is not policy:
        value_settings = settings.model_copy(update={"learning_rate": settings.value_learning_rate})
        value_optimizer = make_optimizer(value.parameters(), value_settings, offload=job.runtime.offload_optimizer)
    policy_optimizer = make_optimizer(policy.parameters(), settings, offload=job.runtime.offload_optimizer)
    return ActorCritic(policy, policy_optimizer, value, value_optimizer, settings.kl_coef)


def _make_zero_value_head(policy: LanguageModel) -> nn.Linear:
    """Make a linear layer from hidden states to one value, with weights of zero."""
    head = nn.Linear(policy.model.config.get_text_config().hidden_size, 1).to(policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
