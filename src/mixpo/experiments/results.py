"""Results of finished runs, read from their `results.json` and the stage folders that it names."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from mixpo.data.errors import InputError
from mixpo.experiments.run import ArmResult, GradientsResult, require_run_format
from mixpo.stages.rows import read_table
from mixpo.stages.stage_cache import read_stage_summary
from mixpo.training.record import read_metrics

MEASURES = {"score": "reward", "true_reward": "true r*", "second_score": "second reward"}
"""Measures of a completion: column of an evaluation, and name in the report."""
SHARES = ("ended",)
"""Columns of an evaluation that are 0 or 1, so that their means are shares of completions."""


@dataclass(frozen=True)
class Run:
    """A finished run: its recipe and the results of its arms and gradient measurements."""

    folder: Path
    name: str
    recipe: dict[str, Any]
    arms: tuple[ArmResult, ...]
    gradients: tuple[GradientsResult, ...]
    mixpo: str

    @property
    def uses_embedded_world(self) -> bool:
        """True for a run on the embedded world, where the true reward of any text is known."""
        return bool(self.recipe["data"]["format"] == "world")


@dataclass(frozen=True)
class StageResult:
    """A finished stage of the runs: its folder, its label, and the arms and seeds that depend on it."""

    key: str
    """Kind and identity, such as `DPO-1a2b3c4d`."""
    folder: Path
    label: str
    """Label among stages of its kind: its run if there are several, its seed, the settings that a sweep changed, and
    whether it is the second reward model."""
    plain: bool
    """True if no sweep changed it and it is not the second reward model."""
    arms: list[str]
    seeds: list[int]
    run: Run

    @property
    def kind(self) -> str:
        """Kind of the stage, such as `DPO`."""
        return self.key.partition("-")[0]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Content of the stage's `summary.json`."""
        return read_stage_summary(self.folder)


@dataclass(frozen=True)
class Results:
    """Results of one run, or of several with the same test prompts; arms are in the order of the recipes."""

    runs: tuple[Run, ...]
    arms: tuple[ArmResult, ...]
    """Arms of all runs; if there are several runs, their names begin with the run's."""

    @property
    def run_names(self) -> str:
        """Names of the runs, joined by commas."""
        return ", ".join(run.name for run in self.runs)

    @cached_property
    def arm_names(self) -> list[str]:
        """Names of all arms and points of sweeps, finished or failed."""
        return list(dict.fromkeys(arm.name for arm in self.arms))

    @cached_property
    def finished_arms(self) -> list[str]:
        """Names of the arms that finished at one seed or more."""
        return [name for name in self.arm_names if self.get_finished_by_seed(name)]

    @cached_property
    def finished_recipe_arms(self) -> list[str]:
        """Names of the finished arms at the recipes' own settings, without the points of sweeps."""
        return [name for name in self.finished_arms if not next(iter(self.get_finished_by_seed(name).values())).changes]

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds at which any arm was run, in order."""
        return list(dict.fromkeys(arm.seed for arm in self.arms))

    def list_arm_results(self, arm_name: str) -> list[ArmResult]:
        """List the results of an arm, finished or failed, one a seed; empty if there is no such arm."""
        return [arm for arm in self.arms if arm.name == arm_name]

    def get_finished_by_seed(self, arm_name: str) -> dict[int, ArmResult]:
        """Return the finished results of an arm by seed; empty if it finished at none."""
        return {arm.seed: arm for arm in self.list_arm_results(arm_name) if arm.status == "done"}

    def have_column(self, arm_names: Sequence[str], column: str) -> bool:
        """Return True if every evaluation of these finished arms has this column."""
        finished = [arm for name in arm_names for arm in self.get_finished_by_seed(name).values()]
        return all(column in read_columns(arm.evaluation) for arm in finished)

    def get_evaluation_column(
        self, arm: str, column: str, seeds: Sequence[int] | None = None
    ) -> Float64[np.ndarray, "seeds prompts"]:
        """Return a column of an arm's evaluations as an array (seeds × prompts), at all finished seeds or `seeds`."""
        done = self.get_finished_by_seed(arm)
        return np.stack([read_columns(done[seed].evaluation)[column] for seed in (done if seeds is None else seeds)])

    def list_common_seeds(self, *arm_names: str) -> list[int]:
        """List the seeds at which all these arms finished."""
        return [seed for seed in self.seeds if all(seed in self.get_finished_by_seed(name) for name in arm_names)]

    def list_run_seeds(self, *arm_names: str) -> list[int]:
        """List the seeds at which all these arms were run, finished or failed."""
        run_seeds = [{arm.seed for arm in self.list_arm_results(name)} for name in arm_names]
        return [seed for seed in self.seeds if all(seed in seeds for seeds in run_seeds)]

    def list_seeds_with_same_scorer(self, column: str, *arm_names: str) -> list[int]:
        """List the seeds at which arms can be compared by a column: all finished, and the same model scored them.

        Every seed has its own reward model, and so may a run, or a point of a sweep.
        """
        seeds = self.list_common_seeds(*arm_names)
        judge = {"score": "reward", "second_score": "second"}.get(column)
        if judge is None:
            return seeds
        return [
            seed
            for seed in seeds
            if len({self.get_finished_by_seed(name)[seed].reward_models.get(judge) for name in arm_names}) == 1
        ]

    def find_run_of_arm(self, arm_name: str) -> Run:
        """Return the run that contains an arm of the results."""
        return next(run for run in self.runs if any(arm.name == arm_name for arm in run.arms))

    def qualify_arm_name(self, run: Run, arm: str) -> str:
        """Return the name by which the results call an arm of a run: `ARM`, or among several runs `RUN: ARM`."""
        return arm if len(self.runs) == 1 else f"{run.name}: {arm}"

    def find_finished_name(self, arm: str) -> str | None:
        """Return the name by which the results call an arm, in the first run where it finished; None if in none."""
        return next(
            (name for run in self.runs if (name := self.qualify_arm_name(run, arm)) in self.finished_recipe_arms), None
        )

    def get_shared_measures(self, arm_names: Sequence[str]) -> dict[str, str]:
        """Return the measures of completions that all these finished arms have: name in the report by column."""
        return {key: label for key, label in MEASURES.items() if self.have_column(arm_names, key)}

    @cached_property
    def stages(self) -> list[StageResult]:
        """Every finished stage of the runs' arms, those of failed arms included, listed once, inputs first."""
        stages: dict[str, StageResult] = {}
        for run in self.runs:
            second = {arm.reward_models.get("second") for arm in run.arms}
            for arm in run.arms:
                for key, place in arm.stages.items():
                    if key not in stages:
                        parts = [f"seed {arm.seed}", *(f"{name}={value}" for name, value in arm.changes.items())]
                        parts = [run.name, *parts] if len(self.runs) > 1 else parts
                        label = ", ".join([*parts, "second"] if key in second else parts)
                        plain = not arm.changes and key not in second
                        stages[key] = StageResult(key, Path(place), label, plain, [], [], run)
                    if arm.name not in stages[key].arms:
                        stages[key].arms.append(arm.name)
                    if arm.seed not in stages[key].seeds:
                        stages[key].seeds.append(arm.seed)
        return list(stages.values())

    def list_stages_of_kind(self, stage_kind: str) -> list[StageResult]:
        """List the finished stages of a kind such as `DPO`, inputs first."""
        return [stage for stage in self.stages if stage.kind == stage_kind]


def select_unswept_stage_per_seed(stages: Sequence[StageResult]) -> list[StageResult]:
    """Select the first run's stages at the recipe's own settings, one a seed; the first stage if there are none."""
    by_seed: dict[int, StageResult] = {}
    for stage in stages:
        if stage.plain and stage.run is stages[0].run:
            by_seed.setdefault(stage.seeds[0], stage)
    return list(by_seed.values()) or [stages[0]]


def format_first_names(names: Sequence[str]) -> str:
    """Format names as text: up to three, or the first two and the number of the others."""
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def locate_arm_model(results: Results, arm_name: str, seed: int | None = None) -> Path:
    """Path of the folder of an arm's model, at its first finished seed if none is given. Raises `InputError`."""
    if arm_name not in results.finished_arms:
        expected = ", ".join(results.finished_arms) or "none, since all failed"
        raise InputError(f"ARM: found {arm_name!r}; expected a finished arm of the run: {expected}")
    finished = results.get_finished_by_seed(arm_name)
    if seed is not None and seed not in finished:
        seeds = ", ".join(map(str, finished))
        raise InputError(f"--seed: found {seed}; expected one at which {arm_name} finished: {seeds}")
    result = next(iter(finished.values())) if seed is None else finished[seed]
    if result.model is None:
        raise InputError(f"ARM: found {arm_name!r}, which chooses among completions; expected an arm with a model")
    return Path(result.model)


def load_runs(*run_folders: Path) -> Results:
    """Load finished runs as one `Results`. Raises `InputError` on unfinished runs or different test prompts."""
    places = [folder.resolve() for folder in run_folders]
    for folder in run_folders:
        if places.count(folder.resolve()) > 1:
            raise InputError(f"{folder}: found this run twice; expected different ones")
    runs = [_load_run(folder) for folder in run_folders]
    _require_same_prompts(runs)
    if len(runs) == 1:
        return Results((runs[0],), runs[0].arms)
    names = [[run.name for run in runs], [run.folder.resolve().name for run in runs], [str(run.folder) for run in runs]]
    distinct = next(candidates for candidates in names if len(set(candidates)) == len(runs))
    runs = [replace(run, name=name) for run, name in zip(runs, distinct, strict=True)]
    runs = [replace(run, arms=tuple(replace(arm, arm=f"{run.name}: {arm.arm}") for arm in run.arms)) for run in runs]
    return Results(tuple(runs), tuple(arm for run in runs for arm in run.arms))


def _load_run(folder: Path) -> Run:
    """Load a finished run. Raises `InputError` if a file, or the folder of one of its stages, is missing."""
    file = folder / "results.json"
    if not file.exists():
        raise InputError(f"{folder}: found no results.json; expected the folder of a finished run, such as runs/world")
    try:
        content = json.loads(file.read_text(encoding="utf8"))
        require_run_format(folder, content.get("format"), "run the recipe again with out=PATH")
        arms = tuple(ArmResult(**arm) for arm in content["arms"])
        gradients = tuple(GradientsResult(**one) for one in content["gradients"])
    except InputError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: found no results of mixpo ({type(error).__name__}: {error}); run the recipe again"
        ) from error
    places = {place for arm in arms for place in [*arm.stages.values(), *arm.trace]}
    for place in places | {one.folder for one in gradients if one.folder}:
        if not (Path(place) / "summary.json").exists():
            raise InputError(f"{place}: found no finished stage there; it was moved or deleted; run the recipe again")
    return Run(folder, content["name"], content["recipe"], arms, gradients, content["mixpo"])


def _require_same_prompts(runs: Sequence[Run]) -> None:
    """Raise `InputError` if two arms have different test prompts, since they are compared prompt by prompt."""
    first, expected = "", list[str]()
    for run in runs:
        for arm in run.arms:
            if arm.evaluation is None:
                continue
            current = f"{run.folder}, {arm.name} at seed {arm.seed}"
            prompts = [str(row["prompt"]) for row in read_completions(arm)]
            if not first:
                first, expected = current, prompts
            if prompts != expected:
                index = next((n for n, (a, b) in enumerate(zip(prompts, expected, strict=False)) if a != b), None)
                where = f"they differ from prompt {index + 1} on" if index is not None else "one begins with the other"
                raise InputError(
                    f"{current}: found {len(prompts)} test prompts, {first} has {len(expected)}, and {where}; expected "
                    "the same prompts everywhere; run with the same data and evaluation.prompts"
                )


def read_evaluation_summary(arm_result: ArmResult) -> dict[str, Any]:
    """Read the summary of a finished arm's evaluation: its `summary.json` as a dictionary."""
    assert arm_result.evaluation is not None
    return read_stage_summary(Path(arm_result.evaluation))


def read_completions(arm_result: ArmResult) -> list[dict[str, Any]]:
    """Read the rows of a finished arm's evaluation (prompt, completion, scores), in the order of the test prompts."""
    assert arm_result.evaluation is not None
    return read_table(Path(arm_result.evaluation) / "completions.parquet")


@lru_cache(maxsize=4096)
def read_columns(folder: str | None) -> dict[str, Float64[np.ndarray, " prompts"]]:
    """Read the numeric columns of an evaluation as arrays by name, in the order of the test prompts; cached."""
    assert folder is not None
    rows = read_table(Path(folder) / "completions.parquet")
    names = [name for name, value in rows[0].items() if name not in ("prompt", "completion")]
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}
    for name, values in columns.items():
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0]) + 1
            raise InputError(
                f"{folder}/completions.parquet: row {row}: found {name} {values[row - 1]}; expected a finite number; "
                "delete the stage's folder and run again"
            )
    return columns


def read_stage_metrics(stage_folder: Path) -> list[dict[str, float]]:
    """Read the metrics that a training stage logged, a dictionary a step; empty if it logged none."""
    return read_metrics(stage_folder)
