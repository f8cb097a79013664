"""A small world's stages, for the tests that compute some."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixpo import DPO, PPO, SFT, Data, Evaluation, Pretrained, RewardModel, Runtime, Samples, Selection, StageCache
from mixpo.data.branches import Completions
from mixpo.data.tokens import tokenize_row
from mixpo.data.world import build_world_tokenizer
from mixpo.models.folders import load_tokenizer
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import ModelLoader
from mixpo.models.samplers import LocalSampler
from mixpo.models.sampling import SampledCompletions
from mixpo.models.scoring import compute_token_logprobs
from mixpo.stages.gradients import Gradients
from mixpo.stages.label_noise import LabelNoise
from mixpo.stages.rows import read_table
from mixpo.stages.stage import RewardStage, Stage
from mixpo.training.job import StageJob, locate_model_folder

CPU = torch.device("cpu")
RUNTIME = Runtime(threads=1, checkpoint_minutes=100)
LIMIT = 40


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows to a JSON Lines file, and return its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class CachedStages:
    """Stages that are computed once, in a cache that tests share."""

    def __init__(self, cache: Path, runtime: Runtime) -> None:
        self.stage_cache = StageCache(cache, runtime)

    def build(self, stage: Stage) -> Path:
        return self.stage_cache.compute_with_inputs(stage)

    def compute(self, stage: Stage, out: Path, runtime: Runtime | None = None) -> Path:
        """Compute a stage into a folder of its own, apart from the cache, or go on with what is in the folder."""
        folders = {name: self.build(source) for name, source in stage.get_input_stages().items()}
        out.mkdir(parents=True, exist_ok=True)
        stage.compute(stage.locate_inputs(folders), StageJob(out, runtime or self.stage_cache.runtime))
        return out

    def load(self, stage: Stage) -> LanguageModel:
        loader, folder = ModelLoader(CPU), locate_model_folder(self.build(stage))
        return loader.load_reward_model(folder) if isinstance(stage, RewardStage) else loader.load_policy(folder)


class World(CachedStages):
    """Stages on 256 pairs, and DPO and PPO with settings that move in a few steps."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache, RUNTIME)
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
            center_coef=0.01,  # so that PPO's score_clip lets the scores through
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
        values = {"policy": self.sft, "reference": self.sft, "pairs": self.selection.easy_pairs, **common, **settings}
        return DPO(max_completion_tokens=LIMIT, **values)

    def ppo(self, **settings: Any) -> PPO:
        common = {"learning_rate": 1e-4, "value_learning_rate": 1e-3, "batch_size": 16, "warmup_steps": 0}
        values = {"policy": self.sft, "reference": self.sft, "prompts": self.selection.hard_pairs, **common, **settings}
        return PPO(sft=self.sft, reward=self.reward, max_completion_tokens=LIMIT, **values)

    def force_completions(self, patch: pytest.MonkeyPatch) -> None:
        """Give DPO and PPO the data's own completions instead of drawn ones, with the log-probs they have.

        For what is compared across processors or threads, where rounding may draw another token. The prompts must be
        those of `data.train_pairs`; the first completion of each is the chosen one, the second the rejected one.
        """
        tokenizer = load_tokenizer(locate_model_folder(self.build(self.base)))
        completions_by_prompt = {}
        for row in read_table(self.build(self.data) / "train.parquet"):
            sides = [row["chosen"], row["rejected"]]
            prompt, completions = tokenize_row(tokenizer, row["prompt"], sides, max_tokens=LIMIT)
            completions_by_prompt[tuple(prompt)] = completions

        def draw_from_data(
            sampler: LocalSampler, prompts: Sequence[list[int]], *, k: int, **_: Any
        ) -> SampledCompletions:
            completions = Completions.from_lists([completions_by_prompt[tuple(prompt)][:k] for prompt in prompts])
            lm = sampler.policy
            logprobs = compute_token_logprobs(lm, prompts, completions, token_budget=65_536)
            ended = [[lm.has_ended(completion) for completion in branches] for branches in completions.to_lists()]
            return SampledCompletions(completions.tokens, completions.mask, logprobs, torch.tensor(ended))

        patch.setattr(LocalSampler, "draw", draw_from_data)


TINY_RUNTIME = Runtime(device="cpu", threads=1, checkpoint_minutes=100)
TINY_LIMIT = 12
SHORT = {"max_completion_tokens": TINY_LIMIT, "warmup_steps": 0}
HH = "\n\nHuman: {0}\n\nAssistant: {1}"


class TinyWorld(CachedStages):
    """The stages of the embedded world on a model of two layers, and on few rows."""

    def __init__(self, folder: Path, *, width: int = 32) -> None:
        super().__init__(folder / "cache", TINY_RUNTIME)
        self.folder, self.numbers = folder, count()
        tokenizer = build_world_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        self.base = Pretrained(path=str(folder / "base"))
        self.pairs = Data(base=self.base, train_rows=64, test_rows=16, demonstration_rows=64)
        self.policy = SFT(base=self.base, data=self.pairs, learning_rate=0.01, batch_size=16, epochs=2, **SHORT)
        self.scored_by = self.reward()
        self.sampled = self.samples(prompts=16)
        self.split = Selection(samples=self.sampled, easy_fraction=0.5)
        self.tuned = self.dpo(epochs=3)
        self._write_files()

    def _write_files(self) -> None:
        """Rows that both formats read, and one whose chosen completion is empty."""
        rows = {"train": range(20), "test": range(20, 26), "more": range(26, 40)}
        for name, numbers in rows.items():
            write_jsonl(self.folder / f"{name}.jsonl", map(self._row, numbers))
        write_jsonl(self.folder / "bad.jsonl", [self._row(1), {**self._row(99), "chosen": ""}])
        write_jsonl(self.folder / "shown.jsonl", [{"prompt": "Q?", "completion": "Shown."}])

    def _row(self, number: int) -> dict[str, str]:
        question = "Why" + number * " so" + "?"
        sides = {side: HH.format(question, f"{side} {number}") for side in ("chosen", "rejected")}
        return {"prompt": question, **sides}

    def sft(self, **settings: Any) -> Stage:
        common = {"base": self.base, "learning_rate": 0.01, "batch_size": 16, **SHORT, **settings}
        return SFT(data=self.pairs, **common)

    def reward(self, **settings: Any) -> Stage:
        common = {"learning_rate": 0.01, "batch_size": 16, "warmup_steps": 0, **SHORT, **settings}
        return RewardModel(policy=self.policy, pairs=self.pairs.train_pairs, data=self.pairs, **common)

    def samples(self, **settings: Any) -> Stage:
        common = {"rows": self.pairs.train_pairs, "prompts": 8, "max_completion_tokens": TINY_LIMIT, **settings}
        return Samples(policy=self.policy, reward=self.scored_by, **common)

    def selection(self, **settings: Any) -> Stage:
        return Selection(samples=self.sampled, **(settings or {"easy_fraction": 0.5}))

    def dpo(self, **settings: Any) -> Stage:
        common = {"policy": self.policy, "reference": self.policy, "pairs": self.sampled.pairs, "samplings": 1}
        steps = {"learning_rate": 0.01, "batch_size": 4, "warmup_steps": 0, **SHORT}
        return DPO(**{**common, **steps, **settings})

    def ppo(self, **settings: Any) -> Stage:
        read = {"policy": self.policy, "reference": self.policy, "sft": self.policy, "reward": self.scored_by}
        steps = {"learning_rate": 3e-3, "value_learning_rate": 3e-3, "batch_size": 8, "warmup_steps": 0, **SHORT}
        return PPO(prompts=self.sampled.pairs, **{**read, **steps, **settings})

    def evaluation(self, **settings: Any) -> Stage:
        read = {"policy": self.tuned, "sft": self.policy, "reward": self.scored_by, "data": self.pairs}
        return Evaluation(**{**read, "prompts": 8, "max_completion_tokens": TINY_LIMIT, **settings})

    def data(self, **settings: Any) -> Stage:
        return Data(base=self.base, **{"format": "preference", "train": f"{self.folder}/train.jsonl", **settings})

    def model(self, **settings: Any) -> Stage:
        return Pretrained(**settings)

    def label_noise(self, **settings: Any) -> Stage:
        return LabelNoise(pairs=self.pairs.train_pairs, **settings)

    def gradients(self, *, pairs: int = 1, **settings: Any) -> Stage:
        read = {"policy": self.tuned, "reference": self.policy, "pairs": self.sampled.pairs}
        return Gradients(**read, beta=0.1, count=pairs, max_completion_tokens=TINY_LIMIT, **settings)

    def run(self, stage: Stage, runtime: Runtime = TINY_RUNTIME) -> Path:
        """Compute a stage, though an equal one may be there; what is upstream is computed once."""
        return self.compute(stage, self.folder / "runs" / str(next(self.numbers)), runtime)
