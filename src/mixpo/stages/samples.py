"""Samples: two completions of each prompt from a policy, scored by the reward model, as input of Selection."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydantic

from mixpo.algorithms.selection import compute_score_gaps, order_by_score
from mixpo.models.digests import compute_model_digest
from mixpo.models.samplers import SamplerName
from mixpo.models.scoring import compute_scores, retokenize_for_reward
from mixpo.stages.rows import format_sampler_name, read_unique_prompts, write_table
from mixpo.stages.stage import Part, PolicyStage, RewardStage, ScoredPairsStage
from mixpo.training.job import StageJob, locate_model_folder
from mixpo.training.resumable_work import ResumableWork
from mixpo.training.step import SeededSettings


class SamplesSettings(SeededSettings):
    """Settings of sampling pairs of completions for the selection."""

    sampler: SamplerName = "local"
    """`vllm` draws completions on a vLLM server (`runtime.vllm`)."""
    temperature: float = pydantic.Field(1.0, gt=0)
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    top_k: int = pydantic.Field(0, ge=0)
    """0 keeps every token."""
    max_completion_tokens: int = pydantic.Field(512, ge=1)
    prompts: int | None = pydantic.Field(None, ge=1)
    """Number of prompts, a random subset that is the same at every seed; all if not given."""


class Samples(ScoredPairsStage, SamplesSettings):
    """Stage that samples two completions of each prompt, scores them, and writes them to `pairs.parquet`, chosen first.

    The completion with the higher score is chosen. Identical completions have the gap 0.
    """

    parts = ("pairs",)

    policy: PolicyStage
    reward: RewardStage
    rows: Part
    """Rows whose prompts are used, each once."""

    @property
    def pairs(self) -> Part:
        """All scored pairs, as the stage's file `pairs.parquet`."""
        return Part(stage=self, of="pairs")

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Sample two completions of each prompt, score them, and write `pairs.parquet`."""
        lm = job.load_policy(input_paths["policy"], self.precision)
        reward = job.load_reward_model(input_paths["reward"], self.precision)
        unique_prompts, prompts = read_unique_prompts(input_paths["rows"], lm.tokenizer, self.prompts)
        resumable = ResumableWork(job)
        completions, logprobs = resumable.sample_in_portions(
            lm,
            prompts,
            k=2,
            max_tokens=self.max_completion_tokens,
            seed=self.seed,
            sampler_name=self.sampler,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )
        reward_inputs = retokenize_for_reward(reward, lm, unique_prompts, prompts, completions)
        scores = resumable.score_in_portions("scores", compute_scores, reward, *reward_inputs).double().numpy()
        identical = np.array([first == second for first, second in completions])
        gaps = np.where(identical, 0.0, compute_score_gaps(scores))
        rows = [
            {
                "prompt": unique_prompts[row],
                "prompt_tokens": prompts[row],
                "gap": float(gaps[row]),
                "completions": [lm.decode_completion(completions[row][branch]) for branch in order],
                "tokens": [completions[row][branch] for branch in order],
                "logprobs": [logprobs[row][branch] for branch in order],
                "scores": scores[row, order].tolist(),
            }
            for row, order in enumerate(order_by_score(scores).tolist())
        ]
        digest = compute_model_digest(locate_model_folder(input_paths["policy"]))
        sampler = format_sampler_name(digest, self.precision, self.sampler)
        if job.processes.is_main_process:
            write_table(job.out / "pairs.parquet", rows, sampler=sampler, tokenizer=lm.tokenization_digest)
        ended = [lm.has_ended(completion) for branches in completions for completion in branches]
        job.finish_stage(
            pairs=len(rows),
            identical=int(identical.sum()),
            gap_mean=float(gaps.mean()),
            gap_median=float(np.median(gaps)),
            gap_under_1=float((gaps < 1).mean()),
            score_std=float(scores.std()),
            end_rate=sum(ended) / len(ended),
        )
