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
    convert_to_unpadded_lists,
    count_tokens_per_prompt,
    select_completions,
    split_into_microbatches,
)
from mixpo.models.language_model import LanguageModel
from mixpo.models.samplers import SamplerName
from mixpo.models.sampling import count_cacheable_tokens, count_earlier_occurrences
from mixpo.training.job import PORTIONS, StageJob
from mixpo.training.record import make_progress_reporter, read_jsonl, write_text

MICROBATCHES = 16
"""Microbatches of a process in a portion of scores or log-probs."""


class ResumableWork:
    """Results of rows, saved in `portions.jsonl`: one line a portion, with its rows, their results and the cost so far.

    The size of portions may change between two runs of a stage (it follows the runtime), the result of a row may not.
    Every process computes with the same portions, each its share of them; the main process writes them.
    """

    def __init__(self, job: StageJob) -> None:
        self.job, self.path, self.cost, self.runtime = job, job.out / PORTIONS, job.cost, job.runtime
        self.lines = job.processes.take_from_main(lambda: read_jsonl(self.path))
        self.seconds = defaultdict[str, float](float)
        """Seconds of each computation by its name, those of earlier runs included."""
        for line in self.lines:
            self.seconds[line["name"]] += line["seconds"]
        if job.processes.is_main_process:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))  # without a torn last line
        if self.lines:
            self.cost.restore_counts(self.lines[-1]["cost"])

    def compute_rows(
        self,
        computation_name: str,
        portions: Iterable[Sequence[int]],
        compute_portion: Callable[[list[int]], Sequence[Any]],
        *,
        report_finished: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Compute the rows not yet saved under this name, saving each portion; return the results of all, in order."""
        results: dict[int, Any] = {}
        for line in self.lines:
            if line["name"] == computation_name:
                results |= zip(line["rows"], line["results"], strict=True)
        for portion in portions:
            rows = sorted(row for row in portion if row not in results)
            if rows:
                started = time.perf_counter()
                computed = list(compute_portion(rows))
                seconds = time.perf_counter() - started
                self.seconds[computation_name] += seconds
                results |= zip(rows, computed, strict=True)
                line = {"name": computation_name, "rows": rows, "results": computed, "seconds": seconds}
                line["cost"] = self.cost.get_counts()
                if self.job.processes.is_main_process:
                    with self.path.open("a", encoding="utf8") as file:
                        file.write(json.dumps(line) + "\n")
            if report_finished is not None:
                report_finished(len(portion))
        return [results[row] for row in sorted(results)]

    def sample_in_portions(
        self,
        lm: LanguageModel,
        prompts: Sequence[Tokens],
        *,
        k: int,
        max_tokens: int,
        sampler_name: SamplerName = "local",
        **sampling: Any,
    ) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
        """Sample k completions of every prompt, resumably; returns (tokens, log-probs) as nested lists."""

        def sample_rows(rows: list[int]) -> list[Any]:
            """Tokens and log-probs of the completions of these prompts, counted in the cost."""
            portion = [prompts[row] for row in rows]
            part_occurrences = [occurrences[row] for row in rows]
            sampled = sampler.draw(portion, k=k, max_tokens=max_tokens, occurrences=part_occurrences, **sampling)
            self.cost.add_sampled_tokens(lm, int(sampled.mask.sum()), sum(map(len, portion)))
            return list(zip(sampled.to_lists(), convert_to_unpadded_lists(sampled.logprobs, sampled.mask), strict=True))

        sampler = self.job.get_sampler(sampler_name)
        sampler.load_policy(lm)
        occurrences = count_earlier_occurrences(prompts)
        lengths = [len(prompt) + max_tokens for prompt in prompts]
        budget = count_cacheable_tokens(lm, self.job.runtime.sampling_bytes) * self.job.processes.count
        portions = split_into_microbatches(lengths, max(1, budget // k), count_padding=True)
        results = self.compute_rows(
            "sampled", portions, sample_rows, report_finished=make_progress_reporter(len(prompts))
        )
        return [completions for completions, _ in results], [logprobs for _, logprobs in results]

    def score_in_portions(
        self,
        computation_name: str,
        compute_numbers: Callable[..., Float[Tensor, "prompts k"]],
        lm: LanguageModel,
        prompts: Sequence[Tokens],
        completions: AnyCompletions,
    ) -> Float[Tensor, "prompts k"]:
        """A number for each completion by `compute_scores` or `compute_sequence_logprobs`, resumably."""
        lengths = count_tokens_per_prompt(prompts, completions)
        budget = MICROBATCHES * self.job.runtime.microbatch_tokens * self.job.processes.count

        def score_rows(rows: list[int]) -> list[Any]:
            """Numbers of the completions of these prompts, counted in the cost."""
            part = [prompts[row] for row in rows], select_completions(completions, rows)
            numbers = self.job.compute_over_processes(compute_numbers, lm, *part)
            self.cost.add_scored_tokens(lm, sum(lengths[row] for row in rows))
            return numbers.tolist()

        portions = split_into_microbatches(lengths, budget)
        return torch.tensor(self.compute_rows(computation_name, portions, score_rows))
