"""Setup: one seed of a recipe, as the arms see it: the stages they share, and the settings of those they add."""

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
class Setup:
    """Every property is one stage, the same object for every arm."""

    recipe: Recipe
    seed: int
    snapshots: int = 0
    """Policies that PPO keeps on its way."""

    def _settings(self, section: Settings) -> dict[str, Any]:
        """A section's settings as keywords, at this seed unless the section sets its own."""
        values = dict(section)
        if "seed" in values and "seed" not in section.model_fields_set:
            values["seed"] = self.seed
        return values

    @cached_property
    def base(self) -> Pretrained:
        """The model that everything starts from."""
        return Pretrained(special_tokens=self.recipe.data.special_tokens, **self._settings(self.recipe.model))

    @cached_property
    def data(self) -> Data:
        """Human pairs and demonstrations."""
        return Data(base=self.base, **self._settings(self.recipe.data))

    @cached_property
    def sft(self) -> SFT:
        """The supervised fine-tuned policy."""
        return SFT(base=self.base, data=self.data, **self._settings(self.recipe.sft))

    @cached_property
    def pairs(self) -> Part:
        """The human pairs, a share of their labels flipped where the recipe says so."""
        if self.recipe.label_noise.share == 0:
            return self.data.train_pairs
        return LabelNoise(pairs=self.data.train_pairs, **self._settings(self.recipe.label_noise)).train_pairs

    @cached_property
    def reward(self) -> RewardModel:
        """The reward model, trained on the human pairs."""
        return self._reward_model(self.pairs)

    @cached_property
    def clean_reward(self) -> RewardModel:
        """The reward model of the labels as given, by which arms are evaluated: `reward`, but for label noise."""
        return self._reward_model(self.data.train_pairs)

    @cached_property
    def second_reward(self) -> RewardModel | None:
        """A reward model of the pairs that were kept apart, for a second opinion."""
        return self._reward_model(self.data.second_pairs) if self.data.second_rows else None

    def _reward_model(self, pairs: Part) -> RewardModel:
        return RewardModel(policy=self.sft, pairs=pairs, data=self.data, **self._settings(self.recipe.reward))

    @cached_property
    def samples(self) -> Samples:
        """Pairs sampled from SFT and scored."""
        settings = self._settings(self.recipe.samples)
        return Samples(policy=self.sft, reward=self.reward, rows=self.data.train_pairs, **settings)

    @cached_property
    def selection(self) -> Selection:
        """The sampled pairs, split."""
        return Selection(samples=self.samples, **self._settings(self.recipe.selection))

    @cached_property
    def dpo(self) -> dict[str, Any]:
        """DPO's settings."""
        return self._settings(self.recipe.dpo)

    @cached_property
    def ppo(self) -> dict[str, Any]:
        """PPO's settings, and what it always reads."""
        read = {"sft": self.sft, "reward": self.reward}
        return {**read, "snapshots": self.snapshots, **self._settings(self.recipe.ppo)}

    def grouped(self, advantage: Literal["rloo", "grpo"]) -> dict[str, Any]:
        """PPO without a value model: `group_size` completions a prompt, as many completions and iterations as `ppo`."""
        k, values = self.recipe.group_size, self.ppo
        if values["batch_size"] % k:
            raise InputError(f"group_size: found {k}; expected a divisor of ppo.batch_size, {values['batch_size']}")
        grouped = {"completions_per_prompt": k, "batch_size": values["batch_size"] // k, "epochs": values["epochs"] / k}
        kept = {key: value for key, value in values.items() if key not in GAE_SETTINGS}
        return {**kept, "advantage": advantage, **grouped}

    def evaluation(self, policy: PolicyStage | Snapshot, *, best_of: int = 1) -> Evaluation:
        """The evaluation of an arm's policy."""
        return Evaluation(
            policy=policy,
            sft=self.sft,
            reward=self.clean_reward,
            second=self.second_reward,
            data=self.data,
            best_of=best_of,
            chooser=self.reward if best_of > 1 and self.reward != self.clean_reward else None,
            **self._settings(self.recipe.evaluation),
        )

    def gradients(self, policy: DPO, pairs: Part) -> Gradients:
        """What a DPO step would do to a model that DPO trained."""
        return Gradients(
            policy=policy,
            reference=policy.reference,
            pairs=pairs,
            beta=policy.beta,
            count=self.recipe.gradients.pairs,
            max_completion_tokens=policy.max_completion_tokens,
        )
