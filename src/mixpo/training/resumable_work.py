"""Work on many rows, saved in portions: a stage that was killed computes only the missing rows."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixpo.data.branches import (
    AnyCompletions,
    Tokens,
    row_lengths,
    select_completions,
    split_into_microbatches,
    unpad,
)
from mixpo.models.language_model import LanguageModel
from mixpo.models.sampling import count_occurrences
from mixpo.training.job import PORTIONS, Job
from mixpo.training.record import make_progress_reporter, read_jsonl, write_text

MICROBATCHES = 16
"""Microbatches of a portion of scores or log-probs."""


class ResumableWork:
    """Results of rows, saved in `portions.jsonl`: one line a portion, with its rows, their results and the cost so far.

    The size of portions may change between two runs of a stage (it follows the runtime), the result of a row may not.
    """

    def __init__(self, job: Job) -> None:
        self.path, self.cost, self.runtime = job.out / PORTIONS, job.cost, job.runtime
        self.lines = read_jsonl(self.path)
        self.seconds = defaultdict[str, float](float)
        """Seconds of each computation by its name, those of earlier runs included."""
        for line in self.lines:
            self.seconds[line["name"]] += line.get("seconds", 0.0)  # of an earlier version
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))  # without a torn last line
        if self.lines:
            self.cost.restore(self.lines[-1]["cost"])

    def compute_rows(
        self,
        name: str,
        portions: Iterable[Sequence[int]],
        work: Callable[[list[int]], Sequence[Any]],
        *,
        advance: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Compute the results of all rows, in the order of rows; `work` computes those that are not saved yet.

        `name` identifies the computation within the stage. Results must be JSON values. `advance` is called with the
        number of rows of each finished portion.
        """
        results: dict[int, Any] = {}
        for line in self.lines:
            if line["name"] == name:
                results |= zip(line["rows"], line["results"], strict=True)
        for portion in portions:
            rows = sorted(row for row in portion if row not in results)
            if rows:
                started = time.perf_counter()
                computed = list(work(rows))
                seconds = time.perf_counter() - started
                self.seconds[name] += seconds
                results |= zip(rows, computed, strict=True)
                line = {"name": name, "rows": rows, "results": computed, "seconds": seconds}
                line["cost"] = self.cost.counts()
                with self.path.open("a", encoding="utf8") as file:
                    file.write(json.dumps(line) + "\n")
            if advance is not None:
                advance(len(portion))
        return [results[row] for row in sorted(results)]

    def sample_completions(
        self,
        lm: LanguageModel,
        prompts: Sequence[Tokens],
        *,
        k: int,
        max_tokens: int,
        **sampling: Any,
    ) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
        """Sample k completions of every prompt, in portions; returns their tokens and log-probs."""

        def sample_rows(rows: list[int]) -> list[Any]:
            portion = [prompts[row] for row in rows]
            part_occurrences = [occurrences[row] for row in rows]
            sampled = sampler.draw(portion, k=k, max_tokens=max_tokens, occurrences=part_occurrences, **sampling)
            self.cost.count_sampled(lm.model, int(sampled.mask.sum()), sum(map(len, portion)))
            return list(zip(sampled.to_lists(), unpad(sampled.logprobs, sampled.mask), strict=True))

        sampler = self.runtime.make_sampler()
        sampler.load_policy(lm)
        occurrences = count_occurrences(prompts)
        lengths = [len(prompt) + max_tokens for prompt in prompts]
        portions = split_into_microbatches(lengths, max(1, self.runtime.sampling_tokens // k), padded=True)
        results = self.compute_rows("sampled", portions, sample_rows, advance=make_progress_reporter(len(prompts)))
        return [completions for completions, _ in results], [logprobs for _, logprobs in results]

    def score_completions(
        self,
        name: str,
        compute: Callable[..., Float[Tensor, "prompts k"]],
        lm: LanguageModel,
        prompts: Sequence[Tokens],
        completions: AnyCompletions,
    ) -> Float[Tensor, "prompts k"]:
        """Compute a number for each completion with `compute_scores` or `compute_sequence_logprobs`."""
        lengths, token_budget = row_lengths(prompts, completions), self.runtime.microbatch_tokens

        def score_rows(rows: list[int]) -> list[Any]:
            part = [prompts[row] for row in rows], select_completions(completions, rows)
            numbers = compute(lm, *part, token_budget=token_budget)
            self.cost.count_scored(lm.model, sum(lengths[row] for row in rows))
            return numbers.tolist()

        portions = split_into_microbatches(lengths, MICROBATCHES * token_budget)
        return torch.tensor(self.compute_rows(name, portions, score_rows))
