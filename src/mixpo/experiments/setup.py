"""Setup: one seed of a recipe, as the arms see it: the stages they share, and the settings of those they add."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mixpo.experiments.recipe import Recipe
from mixpo.settings import Settings
from mixpo.stages.data import Data
from mixpo.stages.evaluation import Evaluation
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.reward_model import RewardModel
from mixpo.stages.samples import Samples
from mixpo.stages.selection import Selection
from mixpo.stages.sft import SFT
from mixpo.stages.stage import Stage


@dataclass(frozen=True)
class Setup:
    """Every property is one stage, the same object for every arm."""

    recipe: Recipe
    seed: int

    def _settings(self, section: Settings) -> dict[str, Any]:
        """A section's settings as keywords, at this seed unless the section sets its own."""
        values = dict(section)
        if "seed" in values and "seed" not in section.model_fields_set:
            values["seed"] = self.seed
        return values

    @cached_property
    def base(self) -> Pretrained:
        """The model that everything starts from."""
        return Pretrained(**self._settings(self.recipe.model))

    @cached_property
    def data(self) -> Data:
        """Human pairs and demonstrations."""
        return Data(base=self.base, **self._settings(self.recipe.data))

    @cached_property
    def sft(self) -> SFT:
        """The supervised fine-tuned policy."""
        return SFT(base=self.base, data=self.data, **self._settings(self.recipe.sft))

    @cached_property
    def reward(self) -> RewardModel:
        """The reward model, trained on the human pairs."""
        settings = self._settings(self.recipe.reward)
        return RewardModel(policy=self.sft, pairs=self.data.train_pairs, data=self.data, **settings)

    @cached_property
    def selection(self) -> Selection:
        """Pairs sampled from SFT, scored and split."""
        rows = self.data.train_pairs
        samples = Samples(policy=self.sft, reward=self.reward, rows=rows, **self._settings(self.recipe.samples))
        return Selection(samples=samples, **self._settings(self.recipe.selection))

    @cached_property
    def dpo(self) -> dict[str, Any]:
        """DPO's settings."""
        return self._settings(self.recipe.dpo)

    @cached_property
    def ppo(self) -> dict[str, Any]:
        """PPO's settings."""
        return self._settings(self.recipe.ppo)

    def evaluation(self, policy: Stage) -> Evaluation:
        """The evaluation of an arm's policy."""
        settings = self._settings(self.recipe.evaluation)
        return Evaluation(policy=policy, sft=self.sft, reward=self.reward, data=self.data, **settings)
