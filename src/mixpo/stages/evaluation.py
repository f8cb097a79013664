"""Evaluation: completions of a policy on held-out prompts, with their scores and their KL from SFT."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mixpo.algorithms.intervals import compute_crossed_mean_interval, wilson_interval
from mixpo.algorithms.kl import kl_bound_of_best_of_n
from mixpo.data.errors import InputError
from mixpo.data.world import true_reward
from mixpo.models.digests import compute_model_digest
from mixpo.models.samplers import SamplerName
from mixpo.models.scoring import compute_scores, compute_sequence_logprobs, retokenize_for_reward
from mixpo.stages.rows import read_unique_prompts, write_table
from mixpo.stages.stage import DataStage, PolicyStage, RewardStage, Snapshot, Stage
from mixpo.training.job import StageJob, locate_model_folder
from mixpo.training.resumable_work import ResumableWork
from mixpo.training.step import SeededSettings


class EvaluationSettings(SeededSettings):
    """Settings of an evaluation stage: number of prompts and length of completions.

    Sampling is always at temperature 1 without truncation, so that reward and KL are of the same distribution.
    """

    sampler: SamplerName = "local"
    """`vllm` draws completions on a vLLM server (`runtime.vllm`)."""
    prompts: int | None = pydantic.Field(256, ge=1)
    """Number of test prompts, a random subset that is the same for every arm and seed; all if null."""
    max_completion_tokens: int = pydantic.Field(512, ge=1)


class Evaluation(Stage, EvaluationSettings):
    """Stage of a policy's completions on test prompts in `completions.parquet`, and their means with 95% intervals."""

    policy: PolicyStage | Snapshot
    sft: PolicyStage
    """The KL is measured from it, whatever the policy's reference was."""
    reward: RewardStage
    second: RewardStage | None = None
    """A reward model trained on other pairs, for which no policy was optimised."""
    data: DataStage
    best_of: int = pydantic.Field(1, ge=1)
    """Number of completions sampled for each prompt, of which the one with the highest score is kept; SFT only."""
    chooser: RewardStage | None = None
    """The reward model by whose score best_of keeps one; `reward` if not given."""

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Sample a policy's completions on test prompts, compute scores and KL, and write `completions.parquet`."""
        lm = job.load_policy(input_paths["policy"], self.precision)
        unique_prompts, prompts = read_unique_prompts(input_paths["data"] / "test.parquet", lm.tokenizer, self.prompts)
        policy, sft_model = (compute_model_digest(locate_model_folder(input_paths[name])) for name in ("policy", "sft"))
        from_sft = policy == sft_model
        if self.best_of > 1 and not from_sft:
            raise InputError(
                f"best_of: found {self.best_of} with another policy than SFT; expected SFT, of whose best of n alone "
                "the KL is known; evaluate the policy with best_of=1"
            )
        resumable = ResumableWork(job)
        completions, sampled_logprobs = resumable.sample_in_portions(
            lm,
            prompts,
            k=self.best_of,
            max_tokens=self.max_completion_tokens,
            seed=self.seed,
            sampler_name=self.sampler,
        )

        def compute_reward_scores(name: str, reward_folder: Path) -> Float[Tensor, "prompts k"]:
            """Scores [prompts, k] of the completions under the reward model in a stage's folder."""
            reward = job.load_reward_model(reward_folder, self.precision)
            reward_inputs = retokenize_for_reward(reward, lm, unique_prompts, prompts, completions)
            return resumable.score_in_portions(name, compute_scores, reward, *reward_inputs)

        chooser = input_paths.get("chooser", input_paths["reward"]) if self.best_of > 1 else input_paths["reward"]
        chooser_scores = compute_reward_scores("chooser", chooser)
        best = chooser_scores.argmax(dim=1).tolist()
        completions = [[branches[index]] for branches, index in zip(completions, best, strict=True)]
        scores = chooser_scores.amax(dim=1)
        if chooser != input_paths["reward"]:
            scores = compute_reward_scores("reward", input_paths["reward"])[:, 0]
        if from_sft:
            kl = torch.full((len(prompts),), kl_bound_of_best_of_n(self.best_of))
        else:
            logprobs = torch.tensor([sum(branches[0]) for branches in sampled_logprobs])
            if self.sampler != "local":  # a server's are higher by its KL to the policy
                logprobs = resumable.score_in_portions("policy", compute_sequence_logprobs, lm, prompts, completions)
                logprobs = logprobs[:, 0]
            sft = job.load_policy(input_paths["sft"], self.precision)
            sft_logprobs = resumable.score_in_portions("sft", compute_sequence_logprobs, sft, prompts, completions)
            kl = logprobs - sft_logprobs[:, 0]

        texts = [lm.decode_completion(branches[0]) for branches in completions]
        columns: dict[str, list[float]] = {
            "score": scores.double().tolist(),
            "kl_from_sft": kl.double().tolist(),
            "tokens": [float(len(branches[0])) for branches in completions],
            "ended": [float(lm.has_ended(branches[0])) for branches in completions],
        }
        if self.second is not None:
            second_scores = compute_reward_scores("second", input_paths["second"])
            columns["second_score"] = second_scores[:, 0].double().tolist()
        if _is_world_data(input_paths["data"]):
            columns["true_reward"] = [
                true_reward(_get_last_message(prompt), text) for prompt, text in zip(unique_prompts, texts, strict=True)
            ]
        table: dict[str, Sequence[Any]] = {"prompt": unique_prompts, "completion": texts, **columns}
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        if job.processes.is_main_process:
            write_table(job.out / "completions.parquet", rows)
        figures = {}
        for name, column in columns.items():
            values: Float64[np.ndarray, " prompts"] = np.array(column, dtype=np.float64)
            if name == "ended":
                figures[name] = asdict(wilson_interval(values.sum(), values.size))
            else:
                figures[name] = asdict(compute_crossed_mean_interval(values[None]))
        job.finish_stage(prompts=len(prompts), distinct=len(set(texts)) / len(texts), **figures)


def _is_world_data(data_folder: Path) -> bool:
    """True if the rows in a data stage's folder are the embedded world's."""
    return bool(json.loads((data_folder / "summary.json").read_text(encoding="utf8"))["format"] == "world")


def _get_last_message(prompt: object) -> str:
    """Text of the last message of a prompt, which must be a list of messages."""
    assert isinstance(prompt, list)
    return str(prompt[-1]["content"])
