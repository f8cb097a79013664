"""Comparisons of two arms, prompt by prompt, as judges and annotators see them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixpo.data.errors import InputError
from mixpo.data.rows import Prompt, make_prompt_key
from mixpo.experiments.recipe import suggest_nearest
from mixpo.experiments.results import Results, read_completions
from mixpo.experiments.run import ArmResult
from mixpo.stages.rows import read_table


class MissingError(InputError):
    """Error on arms, a seed or a number of prompts that a run does not have."""


@dataclass(frozen=True)
class Comparison:
    """A test prompt and the completions of two arms."""

    number: int
    """Index of the prompt among the run's test prompts, from 0."""
    prompt: Prompt
    category: str | None
    completions: tuple[str, str]
    """Completion of the first arm and of the second."""

    @property
    def same(self) -> bool:
        """True if both completions are the same text, which is a tie without asking."""
        return self.completions[0] == self.completions[1]


def choose_compared_seed(results: Results, arms: tuple[str, str], seed: int | None = None) -> int:
    """Return the seed at which two arms are compared: `seed`, or the first at which both finished.

    Raises `MissingError` on an unknown or unfinished arm, on one arm twice, and on a seed that one of them lacks.
    """
    if arms[0] == arms[1]:
        raise MissingError(f"--arms: found {arms[0]} twice; expected two different arms")
    for arm in arms:
        _require_finished_arm(results, arm)
    common = results.list_common_seeds(*arms)
    if not common or (seed is not None and seed not in common):
        raise MissingError(
            f"--seed: found {'no seed' if seed is None else seed}; expected one at which both {arms[0]} and {arms[1]} "
            f"finished: {', '.join(map(str, common)) or 'there is none'}"
        )
    return common[0] if seed is None else seed


def pair_completions(
    results: Results,
    arms: tuple[str, str],
    *,
    seed: int | None = None,
    prompts: int | None = None,
    at_most: int | None = None,
    draw: int = 0,
) -> list[Comparison]:
    """Pair the completions of two arms at a seed (`choose_compared_seed`), in the order of the test prompts.

    `prompts` is the number of prompts, drawn at random by `draw`; a larger draw contains a smaller one. Without it all
    prompts are taken, or at most `at_most`.
    Raises `MissingError` as `choose_compared_seed` does, and on more prompts than there are.
    """
    at = choose_compared_seed(results, arms, seed)
    first, second = (results.finished_by_seed(arm) for arm in arms)
    categories = _read_categories(first[at])
    rows = [
        Comparison(
            number, a["prompt"], categories.get(make_prompt_key(a["prompt"])), (a["completion"], b["completion"])
        )
        for number, (a, b) in enumerate(zip(read_completions(first[at]), read_completions(second[at]), strict=True))
    ]
    if prompts is not None and not 1 <= prompts <= len(rows):
        raise MissingError(f"--prompts: found {prompts}; expected 1 to {len(rows)}, the test prompts of this run")
    count = prompts or min(at_most or len(rows), len(rows))
    return [rows[index] for index in sorted(random.Random(draw).sample(range(len(rows)), len(rows))[:count])]


def list_categories(rows: Sequence[Comparison]) -> list[str]:
    """List the categories of rows, in order of appearance."""
    return list(dict.fromkeys(row.category for row in rows if row.category is not None))


def _require_finished_arm(results: Results, arm: str) -> None:
    """Raise `MissingError` if a run has no such arm or it finished at no seed."""
    if arm not in results.names:
        raise MissingError(f"--arms: found {arm!r}; expected two arms of the run{suggest_nearest(arm, results.names)}")
    if arm not in results.finished:
        reason = results.list_arm_results(arm)[0].reason or "no reason recorded"
        raise MissingError(f"--arms: found {arm}, which failed: {reason}; expected arms that finished; run it again")


def _read_categories(arm: ArmResult) -> dict[str, str]:
    """Read the category of every test prompt that has one, from its first row."""
    categories: dict[str, str] = {}
    for key, folder in arm.stages.items():
        if key.partition("-")[0] == "Data":
            for row in read_table(Path(folder) / "test.parquet"):
                if row.get("category") is not None:
                    categories.setdefault(make_prompt_key(row["prompt"]), row["category"])
    return categories
