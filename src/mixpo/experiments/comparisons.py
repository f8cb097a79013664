"""Two arms side by side, prompt by prompt: what a judge or a person is shown."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixpo.data.errors import InputError
from mixpo.data.rows import Prompt, prompt_key
from mixpo.experiments.recipe import suggest_nearest
from mixpo.experiments.results import Results, read_completions
from mixpo.experiments.run import ArmResult
from mixpo.stages.rows import read_table


class MissingError(InputError):
    """What a run does not have: two such arms, a seed, or so many prompts."""


@dataclass(frozen=True)
class Comparison:
    """A test prompt and what two arms completed it with."""

    number: int
    """The place of the prompt among the run's test prompts, from 0."""
    prompt: Prompt
    category: str | None
    completions: tuple[str, str]
    """Of the first arm and of the second."""

    @property
    def same(self) -> bool:
        """Whether both arms say the same, which is a tie that nobody needs to be asked about."""
        return self.completions[0] == self.completions[1]


def choose_compared_seed(results: Results, arms: tuple[str, str], seed: int | None = None) -> int:
    """The seed at which two arms are compared: the one given, else the first at which both finished.

    Raises `MissingError` on an arm that is not there or did not finish, on one arm twice, and on a seed that one of
    them lacks.
    """
    if arms[0] == arms[1]:
        raise MissingError(f"--arms: found {arms[0]} twice; expected two different arms")
    for arm in arms:
        _refuse_unfinished(results, arm)
    common = results.common_seeds(*arms)
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

    `prompts` takes so many, drawn by `draw`, and more take these and others; all if not given, or `at_most` so many.
    Raises `MissingError` as `choose_compared_seed` does, and on more prompts than there are.
    """
    at = choose_compared_seed(results, arms, seed)
    first, second = (results.done(arm) for arm in arms)
    kinds = _categories(first[at])
    rows = [
        Comparison(number, one["prompt"], kinds.get(prompt_key(one["prompt"])), (one["completion"], two["completion"]))
        for number, (one, two) in enumerate(zip(read_completions(first[at]), read_completions(second[at]), strict=True))
    ]
    if prompts is not None and not 1 <= prompts <= len(rows):
        raise MissingError(f"--prompts: found {prompts}; expected 1 to {len(rows)}, the test prompts of this run")
    count = prompts or min(at_most or len(rows), len(rows))
    return [rows[place] for place in sorted(random.Random(draw).sample(range(len(rows)), len(rows))[:count])]


def list_categories(rows: Sequence[Comparison]) -> list[str]:
    """The categories of rows, in order of appearance; none where rows have none."""
    return list(dict.fromkeys(row.category for row in rows if row.category is not None))


def _refuse_unfinished(results: Results, arm: str) -> None:
    if arm not in results.names:
        raise MissingError(f"--arms: found {arm!r}; expected two arms of the run{suggest_nearest(arm, results.names)}")
    if arm not in results.finished:
        reason = results.of(arm)[0].reason or "no reason was kept"
        raise MissingError(f"--arms: found {arm}, which failed: {reason}; expected arms that finished; run it again")


def _categories(arm: ArmResult) -> dict[str, str]:
    """The category of every test prompt whose row has one; a prompt of several rows has its first row's."""
    found: dict[str, str] = {}
    for key, folder in arm.stages.items():
        if key.partition("-")[0] == "Data":
            for row in read_table(Path(folder) / "test.parquet"):
                if row.get("category") is not None:
                    found.setdefault(prompt_key(row["prompt"]), row["category"])
    return found
