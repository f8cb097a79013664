"""Work on many rows in portions, each kept on disk once it is done: a stage that was killed does what is left."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixpo.data.branches import Tokens, by_tokens, row_lengths
from mixpo.models.language_model import LanguageModel
from mixpo.models.sampling import Sampled, count_occurrences, sample
from mixpo.models.scoring import Completions
from mixpo.training.record import Cost, progress, read_jsonl, write_text

MICROBATCHES = 16
"""Microbatches of a portion that only goes forward."""


class Portions:
    """`portions.jsonl` in a stage's folder: a line a portion, with its rows' results and the cost up to there.

    Which rows make a portion may change between two runs (it follows the runtime); what is computed from a row may not.
    """

    def __init__(self, folder: Path, cost: Cost) -> None:
        self.path = folder / "portions.jsonl"
        self.cost = cost
        self.lines = read_jsonl(self.path)
        self.seconds = defaultdict[str, float](float)
        """Spent on each computation by its name, by earlier processes too."""
        for line in self.lines:
            self.seconds[line["name"]] += line.get("seconds", 0.0)  # of an earlier version
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))  # without a torn last line
        if self.lines:
            cost.resume(self.lines[-1]["cost"])

    def compute(
        self,
        name: str,
        portions: Iterable[Sequence[int]],
        work: Callable[[list[int]], Sequence[Any]],
        *,
        advance: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """The results of all rows, in the rows' order. `work` computes those of a portion that are not on disk.

        `name` tells the stage's computations apart. A result is what JSON can hold. `advance` is called with the number
        of rows that are done.
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

    def draw(
        self, lm: LanguageModel, prompts: Sequence[Tokens], *, k: int, max_tokens: int, token_budget: int, **how: Any
    ) -> list[Sampled]:
        """What `sample` draws, in portions that fill its cache once."""

        def work(rows: list[int]) -> list[Any]:
            portion = [prompts[row] for row in rows]
            numbers = [occurrences[row] for row in rows]
            drawn = sample(
                lm, portion, k=k, max_tokens=max_tokens, token_budget=token_budget, occurrences=numbers, **how
            )
            tokens = sum(len(completion) for row in drawn for completion in row.completions)
            self.cost.sampled(lm.model, tokens, sum(map(len, portion)))
            return [(row.completions, row.logprobs) for row in drawn]

        occurrences = count_occurrences(prompts)
        lengths = [len(prompt) + max_tokens for prompt in prompts]
        portions = by_tokens(lengths, max(1, token_budget // k), padded=True)
        results = self.compute("drawn", portions, work, advance=progress(len(prompts)))
        return [Sampled(completions, logprobs) for completions, logprobs in results]

    def read(
        self,
        name: str,
        read: Callable[..., Float[Tensor, "prompts k"]],
        lm: LanguageModel,
        prompts: Sequence[Tokens],
        completions: Completions,
        *,
        token_budget: int,
    ) -> Float[Tensor, "prompts k"]:
        """A number for each completion, by `scores` or `sequence_logprobs`."""
        lengths = row_lengths(prompts, completions)

        def work(rows: list[int]) -> list[Any]:
            numbers = read(lm, [prompts[n] for n in rows], [completions[n] for n in rows], token_budget=token_budget)
            self.cost.scored(lm.model, sum(lengths[row] for row in rows))
            return numbers.tolist()

        return torch.tensor(self.compute(name, by_tokens(lengths, MICROBATCHES * token_budget), work))

    def remove(self) -> None:
        """Forget the portions: the stage is done."""
        self.path.unlink(missing_ok=True)
