"""Samples: two completions a prompt from a policy, scored by the reward model. What Selection splits."""

from collections.abc import Mapping
from pathlib import Path

import pydantic

from mixpo.data.tokens import completion_text, prompt_tokens
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import load_policy, load_reward_model, model_digest
from mixpo.models.sampling import sample
from mixpo.models.scoring import retokenised, scores
from mixpo.stages.rows import read_table, sampler_name, unique_prompts, write_table
from mixpo.stages.stage import Part, Seeded, Stage, finish, model_in
from mixpo.training.record import Cost, progress
from mixpo.training.runtime import Runtime


class SamplesSettings(Seeded):
    """How completions are drawn."""

    temperature: float = pydantic.Field(1.0, gt=0)
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    top_k: int = pydantic.Field(0, ge=0)
    """0 keeps every token."""
    max_completion_tokens: int = pydantic.Field(512, ge=1)
    prompts: int | None = pydantic.Field(None, ge=1)
    """Use the first so many prompts; all if not given."""


class Samples(Stage, SamplesSettings):
    """Writes `samples.parquet`: prompt, completions, tokens, logprobs, scores (two of each)."""

    policy: Stage
    reward: Stage
    rows: Part
    """Whose prompts are used, each once."""

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Sample and score."""
        device, cost = runtime.start(), Cost()
        lm = load_policy(model_in(inputs["policy"]), device=device, precision=self.precision)
        reward = load_reward_model(model_in(inputs["reward"]), device=device, precision=self.precision)
        asked = unique_prompts(read_table(inputs["rows"]), self.prompts)
        prompts = [prompt_tokens(lm.tokenizer, prompt) for prompt in asked]
        drawn = sample(
            lm,
            prompts,
            k=2,
            max_tokens=self.max_completion_tokens,
            seed=self.seed,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            token_budget=runtime.sampling_tokens,
            advance=progress(len(prompts)),
        )
        completions = [row.completions for row in drawn]
        cost.sampled(lm.model, _count(completions), sum(map(len, prompts)))
        found = scores(
            reward, *retokenised(reward, lm, asked, prompts, completions), token_budget=runtime.microbatch_tokens
        )
        cost.scored(reward.model, _count(completions) + sum(map(len, prompts)))
        rows = [
            {
                "prompt": prompt,
                "completions": [completion_text(lm.tokenizer, completion) for completion in row.completions],
                "tokens": row.completions,
                "logprobs": row.logprobs,
                "scores": score,
            }
            for prompt, row, score in zip(asked, drawn, found.double().tolist(), strict=True)
        ]
        sampler = sampler_name(model_digest(model_in(inputs["policy"])), self.precision)
        write_table(out / "samples.parquet", rows, sampler=sampler)
        finish(out, cost, prompts=len(rows), end_rate=_end_rate(lm, completions))


def _count(completions: list[list[list[int]]]) -> int:
    return sum(len(completion) for branches in completions for completion in branches)


def _end_rate(lm: LanguageModel, completions: list[list[list[int]]]) -> float:
    ended = [completion[-1] == lm.end_token for branches in completions for completion in branches]
    return sum(ended) / len(ended)
