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


class NotInRunError(InputError):
    """Raised where a run lacks the arms, the seed or as many test prompts as a comparison asks for."""


@dataclass(frozen=True)
class Comparison:
    """A test prompt with the completions of two arms, as judges and annotators compare them."""

    number: int
    """Index of the prompt among the run's test prompts, from 0."""
    prompt: Prompt
    category: str | None
    completions: tuple[str, str]
    """Completion of the first arm and of the second."""

    @property
    def is_identical(self) -> bool:
        """True if both completions are the same text, which is a tie that nobody is asked about."""
        return self.completions[0] == self.completions[1]


def choose_compared_seed(results: Results, arms: tuple[str, str], seed: int | None = None) -> int:
    """Return the seed at which two arms are compared: `seed`, or if None the first at which both finished.

    Raises `NotInRunError` on an unknown or unfinished arm, one arm twice, and a seed that one of them lacks.
    """
    if arms[0] == arms[1]:
        raise NotInRunError(f"--arms: found {arms[0]} twice; expected two different arms")
    for arm in arms:
        _require_finished_arm(results, arm)
    common = results.list_common_seeds(*arms)
    if not common or (seed is not None and seed not in common):
        raise NotInRunError(
            f"--seed: found {'no seed' if seed is None else seed}; expected one at which both {arms[0]} and {arms[1]} "
            f"finished: {', '.join(map(str, common)) or 'there is none'}"
        )
    return common[0] if seed is None else seed


def pair_completions(
    results: Results,
    arms: tuple[str, str],
    *,
    seed: int | None = None,
    prompt_count: int | None = None,
    max_prompts: int | None = None,
    draw_seed: int = 0,
) -> list[Comparison]:
    """List the test prompts, or `prompt_count` drawn ones, with two arms' completions, in the order of the test set.

    The prompts are drawn at random by `draw_seed`; a larger draw contains a smaller one. Without `prompt_count` all are
    taken, or at most `max_prompts`.
    Raises `NotInRunError` as `choose_compared_seed` does, and on more prompts than there are.
    """
    at = choose_compared_seed(results, arms, seed)
    first, second = (results.get_finished_by_seed(arm) for arm in arms)
    categories = _read_categories_by_prompt(first[at])
    rows: list[Comparison] = []
    for a, b in zip(read_completions(first[at]), read_completions(second[at]), strict=True):
        category = categories.get(make_prompt_key(a["prompt"]))
        rows.append(Comparison(len(rows), a["prompt"], category, (a["completion"], b["completion"])))
    if prompt_count is not None and not 1 <= prompt_count <= len(rows):
        raise NotInRunError(f"--prompts: found {prompt_count}; expected 1 to {len(rows)}, the test prompts of this run")
    count = prompt_count or min(max_prompts or len(rows), len(rows))
    return [rows[index] for index in sorted(random.Random(draw_seed).sample(range(len(rows)), len(rows))[:count])]


def list_categories(comparisons: Sequence[Comparison]) -> list[str]:
    """List the distinct categories of comparisons in order of appearance, without None."""
    return list(dict.fromkeys(row.category for row in comparisons if row.category is not None))


def _require_finished_arm(results: Results, arm: str) -> None:
    """Raise `NotInRunError` if there is no such arm or it finished at no seed."""
    if arm not in results.arm_names:
        raise NotInRunError(
            f"--arms: found {arm!r}; expected two arms of the run{suggest_nearest(arm, results.arm_names)}"
        )
    if arm not in results.finished_arms:
        reason = results.list_arm_results(arm)[0].reason or "no reason recorded"
        raise NotInRunError(f"--arms: found {arm}, which failed: {reason}; expected arms that finished; run it again")


def _read_categories_by_prompt(arm_result: ArmResult) -> dict[str, str]:
    """Read the categories of an arm's test prompts: by prompt key, without prompts that have none."""
    categories: dict[str, str] = {}
    for key, folder in arm_result.stages.items():
        if key.partition("-")[0] == "Data":
            for row in read_table(Path(folder) / "test.parquet"):
                if row.get("category") is not None:
                    categories.setdefault(make_prompt_key(row["prompt"]), row["category"])
    return categories
