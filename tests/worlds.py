"""A small world's stages, for the tests that compute some."""

from pathlib import Path
from typing import Any

from mixpo import DPO, PPO, SFT, Data, Engine, Pretrained, RewardModel, Runtime, Samples, Selection
from mixpo.stages.stage import Stage

RUNTIME = Runtime(threads=1, checkpoint_minutes=100)
LIMIT = 40


class World:
    """Stages on 256 pairs, and DPO and PPO with settings that move in a few steps."""

    def __init__(self, cache: Path) -> None:
        self.engine = Engine(cache, RUNTIME)
        self.base = Pretrained()
        self.data = Data(base=self.base, train_rows=256, test_rows=48, demonstration_rows=256)
        self.sft = SFT(
            base=self.base,
            data=self.data,
            learning_rate=2e-3,
            batch_size=32,
            epochs=3,
            warmup_steps=2,
            max_completion_tokens=LIMIT,
        )
        self.reward = RewardModel(
            policy=self.sft,
            pairs=self.data.train_pairs,
            data=self.data,
            learning_rate=5e-4,
            batch_size=32,
            warmup_steps=2,
            max_completion_tokens=LIMIT,
        )
        self.samples = Samples(
            policy=self.sft,
            reward=self.reward,
            rows=self.data.train_pairs,
            prompts=64,
            max_completion_tokens=LIMIT,
        )
        self.selection = Selection(samples=self.samples, easy_fraction=0.5)

    def dpo(self, **settings: Any) -> DPO:
        common = {"learning_rate": 1e-3, "batch_size": 16, "warmup_steps": 0, "samplings": 1}
        values = {"policy": self.sft, "reference": self.sft, "pairs": self.selection.easy, **common, **settings}
        return DPO(max_completion_tokens=LIMIT, **values)

    def ppo(self, **settings: Any) -> PPO:
        common = {"learning_rate": 1e-4, "value_learning_rate": 1e-3, "batch_size": 16, "warmup_steps": 0}
        values = {"policy": self.sft, "reference": self.sft, "prompts": self.selection.hard, **common, **settings}
        return PPO(sft=self.sft, reward=self.reward, max_completion_tokens=LIMIT, **values)

    def build(self, stage: Stage) -> Path:
        return self.engine.build(stage)
