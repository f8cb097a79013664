"""A small world's stages, for the tests that compute some."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mixpo import DPO, PPO, SFT, Data, Engine, Pretrained, RewardModel, Runtime, Samples, Selection
from mixpo.data.tokens import completion_tokens, prompt_tokens
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import load_tokenizer
from mixpo.models.sampling import Sampled
from mixpo.models.scoring import token_logprobs
from mixpo.stages import dpo, ppo
from mixpo.stages.rows import read_table
from mixpo.stages.stage import Stage, model_in

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

    def work(self, stage: Stage, out: Path, runtime: Runtime = RUNTIME) -> Path:
        """Compute a stage into a folder of its own, apart from the cache."""
        folders = {name: self.build(source) for name, source in stage.inputs().items()}
        out.mkdir()
        stage.work(stage.paths(folders), out, runtime)
        return out

    def force_completions(self, patch: pytest.MonkeyPatch) -> None:
        """Give DPO and PPO the data's own completions instead of drawn ones, with the log-probs they have.

        For what is compared across processors or threads, where rounding may draw another token. The prompts must be
        those of `data.train_pairs`; the first completion of each is the chosen one, the second the rejected one.
        """
        tokenizer = load_tokenizer(model_in(self.build(self.base)))
        rows = read_table(self.build(self.data) / "train.parquet")
        given = {
            tuple(prompt_tokens(tokenizer, row["prompt"])): [
                completion_tokens(tokenizer, row[side], limit=LIMIT) for side in ("chosen", "rejected")
            ]
            for row in rows
        }

        def read(
            lm: LanguageModel, prompts: Sequence[list[int]], *, k: int, token_budget: int, **_: Any
        ) -> list[Sampled]:
            completions = [given[tuple(prompt)][:k] for prompt in prompts]
            logprobs = token_logprobs(lm, prompts, completions, token_budget=token_budget).tolist()
            return [
                Sampled(branches, [kept[: len(tokens)] for kept, tokens in zip(each, branches, strict=True)])
                for branches, each in zip(completions, logprobs, strict=True)
            ]

        for module in (dpo, ppo):
            patch.setattr(module, "sample", read)
