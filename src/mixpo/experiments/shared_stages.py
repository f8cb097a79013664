"""One seed of a recipe as the arms see it: the stages they share, and the settings of the stages they add."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mixpo.data.errors import InputError
from mixpo.experiments.recipe import Recipe
from mixpo.settings import Settings
from mixpo.stages.data import Data
from mixpo.stages.dpo import DPO
from mixpo.stages.evaluation import Evaluation
from mixpo.stages.gradients import Gradients
from mixpo.stages.label_noise import LabelNoise
from mixpo.stages.ppo_settings import GAE_SETTINGS
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.reward_model import RewardModel
from mixpo.stages.samples import Samples
from mixpo.stages.selection import Selection
from mixpo.stages.sft import SFT
from mixpo.stages.stage import Part, PolicyStage, Snapshot


@dataclass(frozen=True)
class SharedStages:
    """The stages that the arms of a recipe share at one seed; every property is one stage, the same for every arm."""

    recipe: Recipe
    seed: int
    snapshots: int = 0
    """Number of policies that PPO saves during training."""

    def _fill_in_seed(self, section_settings: Settings) -> dict[str, Any]:
        """Return a section's settings as keywords, with this seed unless the section sets its own."""
        values = dict(section_settings)
        if "seed" in values and "seed" not in section_settings.model_fields_set:
            values["seed"] = self.seed
        return values

    @cached_property
    def base(self) -> Pretrained:
        """The stage of the pretrained base model."""
        return Pretrained(special_tokens=self.recipe.data.special_tokens, **self._fill_in_seed(self.recipe.model))

    @cached_property
    def data(self) -> Data:
        """The stage of the human pairs and demonstrations."""
        return Data(base=self.base, **self._fill_in_seed(self.recipe.data))

    @cached_property
    def sft(self) -> SFT:
        """The stage of supervised fine-tuning of the base model."""
        return SFT(base=self.base, data=self.data, **self._fill_in_seed(self.recipe.sft))

    @cached_property
    def pairs(self) -> Part:
        """The human training pairs, some with flipped labels if the recipe says so."""
        if self.recipe.label_noise.share == 0:
            return self.data.train_pairs
        return LabelNoise(pairs=self.data.train_pairs, **self._fill_in_seed(self.recipe.label_noise)).train_pairs

    @cached_property
    def reward(self) -> RewardModel:
        """The stage of the reward model, trained on the human pairs with any flipped labels."""
        return self._build_reward_model(self.pairs)

    @cached_property
    def clean_reward(self) -> RewardModel:
        """The stage of the reward model that evaluates arms, trained on the human pairs without flipped labels."""
        return self._build_reward_model(self.data.train_pairs)

    @cached_property
    def second_reward(self) -> RewardModel | None:
        """The stage of a second reward model, trained on the held-out second pairs; None if there are none."""
        return self._build_reward_model(self.data.second_pairs) if self.data.second_rows else None

    def _build_reward_model(self, pairs: Part) -> RewardModel:
        """Build the stage of a reward model that starts from SFT and is trained on these pairs."""
        return RewardModel(policy=self.sft, pairs=pairs, data=self.data, **self._fill_in_seed(self.recipe.reward))

    @cached_property
    def samples(self) -> Samples:
        """The stage of the pairs sampled from SFT and scored by the reward model."""
        settings = self._fill_in_seed(self.recipe.samples)
        return Samples(policy=self.sft, reward=self.reward, rows=self.data.train_pairs, **settings)

    @cached_property
    def selection(self) -> Selection:
        """The stage that splits the sampled pairs into easy and hard ones."""
        return Selection(samples=self.samples, **self._fill_in_seed(self.recipe.selection))

    @cached_property
    def dpo(self) -> dict[str, Any]:
        """Keywords of a DPO stage: the recipe's settings of DPO."""
        return self._fill_in_seed(self.recipe.dpo)

    @cached_property
    def ppo(self) -> dict[str, Any]:
        """Keywords of a PPO stage: the recipe's settings of PPO, the SFT stage and the reward model."""
        inputs = {"sft": self.sft, "reward": self.reward}
        return {**inputs, "snapshots": self.snapshots, **self._fill_in_seed(self.recipe.ppo)}

    def grouped_ppo(self, advantage: Literal["rloo", "grpo"]) -> dict[str, Any]:
        """Return keywords of an RLOO or GRPO stage: those of PPO without value model, a batch divided into groups."""
        k, values = self.recipe.group_size, self.ppo
        if values["batch_size"] % k:
            raise InputError(f"group_size: found {k}; expected a divisor of ppo.batch_size, {values['batch_size']}")
        grouped = {"completions_per_prompt": k, "batch_size": values["batch_size"] // k, "epochs": values["epochs"] / k}
        shared = {key: value for key, value in values.items() if key not in GAE_SETTINGS}
        return {**shared, "advantage": advantage, **grouped}

    def build_evaluation(self, policy: PolicyStage | Snapshot, *, best_of: int = 1) -> Evaluation:
        """Build the stage that evaluates a policy, or the best of `best_of` completions by the reward model."""
        return Evaluation(
            policy=policy,
            sft=self.sft,
            reward=self.clean_reward,
            second=self.second_reward,
            data=self.data,
            best_of=best_of,
            chooser=self.reward if best_of > 1 and self.reward != self.clean_reward else None,
            **self._fill_in_seed(self.recipe.evaluation),
        )

    def build_gradients(self, policy: DPO, pairs: Part) -> Gradients:
        """Build the stage that measures the gradients of a DPO model on a part of the sampled pairs."""
        return Gradients(
            policy=policy,
            reference=policy.reference,
            pairs=pairs,
            beta=policy.beta,
            count=self.recipe.gradients.pairs,
            max_completion_tokens=policy.max_completion_tokens,
        )
