"""Finished runs as the report reads them: their `results.json` and the folders that it names."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from mixpo.data.errors import InputError
from mixpo.experiments.run import FORMAT, ArmResult, GradientsResult
from mixpo.stages.engine import read_summary
from mixpo.stages.rows import read_table

MEASURES = {"score": "reward", "true_reward": "true r*", "second_score": "second reward"}
"""What is measured of a completion: the column of an evaluation, and its name in the report."""
SHARES = ("ended",)
"""Columns of an evaluation that are 1 or 0 of a completion: their means are shares."""


@dataclass(frozen=True)
class Run:
    """A finished run as `mixpo run` left it."""

    folder: Path
    name: str
    recipe: dict[str, Any]
    arms: tuple[ArmResult, ...]
    gradients: tuple[GradientsResult, ...]
    mixpo: str

    @property
    def is_world(self) -> bool:
        """Whether the true reward of any text is known."""
        return bool(self.recipe["data"]["format"] == "world")


@dataclass(frozen=True)
class StageFolder:
    """A stage of the runs, with the arms and seeds that stand on it."""

    key: str
    """Such as `DPO-1a2b3c4d`."""
    folder: Path
    label: str
    """What tells it from others of its kind: its run if there are several, its seed, the settings that differ from the
    recipe at points of a sweep, and whether it is the second reward model, which only measures."""
    plain: bool
    """Whether it is of the recipe as it stands, and not the second reward model."""
    arms: list[str]
    seeds: list[int]
    run: Run

    @property
    def kind(self) -> str:
        """Such as DPO."""
        return self.key.partition("-")[0]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Its `summary.json`."""
        return read_summary(self.folder)


@dataclass(frozen=True)
class Results:
    """One run or several on the same test prompts. An arm is known by its name, in the order of the recipes."""

    runs: tuple[Run, ...]
    arms: tuple[ArmResult, ...]
    """Of all runs; where there are several, their names begin with the run's."""

    @property
    def title(self) -> str:
        """The runs' names."""
        return ", ".join(run.name for run in self.runs)

    @cached_property
    def names(self) -> list[str]:
        """All arms."""
        return list(dict.fromkeys(arm.name for arm in self.arms))

    @cached_property
    def finished(self) -> list[str]:
        """The arms that finished at one seed or more."""
        return [name for name in self.names if self.done(name)]

    @cached_property
    def plain(self) -> list[str]:
        """The finished arms as the recipes have them, without the points of sweeps."""
        return [name for name in self.finished if not next(iter(self.done(name).values())).changes]

    @cached_property
    def seeds(self) -> list[int]:
        """All seeds."""
        return list(dict.fromkeys(arm.seed for arm in self.arms))

    def of(self, name: str) -> list[ArmResult]:
        """An arm at every seed."""
        return [arm for arm in self.arms if arm.name == name]

    def done(self, name: str) -> dict[int, ArmResult]:
        """An arm at the seeds at which it finished."""
        return {arm.seed: arm for arm in self.of(name) if arm.status == "done"}

    def has(self, names: Sequence[str], key: str) -> bool:
        """Whether every evaluation of these finished arms has a column."""
        return all(key in read_columns(arm.evaluation) for name in names for arm in self.done(name).values())

    def values(self, name: str, key: str, seeds: Sequence[int] | None = None) -> Float64[np.ndarray, "seeds prompts"]:
        """A column of an arm's evaluations at the seeds at which it finished, or at those given."""
        done = self.done(name)
        return np.stack([read_columns(done[seed].evaluation)[key] for seed in (done if seeds is None else seeds)])

    def common_seeds(self, *names: str) -> list[int]:
        """The seeds at which all these arms finished."""
        return [seed for seed in self.seeds if all(seed in self.done(name) for name in names)]

    def ran(self, *names: str) -> list[int]:
        """The seeds at which all these arms were run, finished or failed."""
        return [seed for seed in self.seeds if all(any(arm.seed == seed for arm in self.of(name)) for name in names)]

    def comparable(self, key: str, *names: str) -> list[int]:
        """The seeds at which these arms' values of a column are on one scale: all finished, scored by the same model.

        Every seed has its own reward model, and so may a run, or a point of a sweep.
        """
        seeds = self.common_seeds(*names)
        judge = {"score": "reward", "second_score": "second"}.get(key)
        if judge is None:
            return seeds
        return [seed for seed in seeds if len({self.done(name)[seed].reward_models.get(judge) for name in names}) == 1]

    def run_of(self, name: str) -> Run:
        """The run of an arm."""
        return next(run for run in self.runs if any(arm.name == name for arm in run.arms))

    def named(self, run: Run, arm: str) -> str:
        """What an arm of a run's recipe is called here."""
        return arm if len(self.runs) == 1 else f"{run.name}: {arm}"

    def first(self, arm: str) -> str | None:
        """The name of an arm of the recipes in the first run in which it finished."""
        return next((name for run in self.runs if (name := self.named(run, arm)) in self.plain), None)

    def measures(self, names: Sequence[str]) -> dict[str, str]:
        """The measures that all these arms have, with their names."""
        return {key: label for key, label in MEASURES.items() if self.has(names, key)}

    @cached_property
    def stages(self) -> list[StageFolder]:
        """Every complete stage of the runs once, inputs first."""
        found: dict[str, StageFolder] = {}
        for run in self.runs:
            second = {arm.reward_models.get("second") for arm in run.arms}
            for arm in run.arms:
                for key, place in arm.stages.items():
                    if key not in found:
                        parts = [f"seed {arm.seed}", *(f"{name}={value}" for name, value in arm.changes.items())]
                        parts = [run.name, *parts] if len(self.runs) > 1 else parts
                        label = ", ".join([*parts, "second"] if key in second else parts)
                        plain = not arm.changes and key not in second
                        found[key] = StageFolder(key, Path(place), label, plain, [], [], run)
                    _add(found[key].arms, arm.name)
                    _add(found[key].seeds, arm.seed)
        return list(found.values())

    def stages_of(self, kind: str) -> list[StageFolder]:
        """The complete stages of a kind."""
        return [stage for stage in self.stages if stage.kind == kind]


def stages_by_seed(stages: Sequence[StageFolder]) -> list[StageFolder]:
    """Of the first run's recipe as it stands, one stage a seed."""
    by_seed: dict[int, StageFolder] = {}
    for stage in stages:
        if stage.plain and stage.run is stages[0].run:
            by_seed.setdefault(stage.seeds[0], stage)
    return list(by_seed.values()) or [stages[0]]


def list_first(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _add(items: list[Any], item: Any) -> None:
    if item not in items:
        items.append(item)


def load_runs(*folders: Path) -> Results:
    """Read finished runs. Raises `InputError` if one is none, or of another version, or has other test prompts."""
    twice = next((folder for folder in folders if sum(one.resolve() == folder.resolve() for one in folders) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: found this run twice; expected different ones")
    runs = [_load(folder) for folder in folders]
    _refuse_other_prompts(runs)
    if len(runs) == 1:
        return Results((runs[0],), runs[0].arms)
    names = [[run.name for run in runs], [run.folder.resolve().name for run in runs], [str(run.folder) for run in runs]]
    told = next(each for each in names if len(set(each)) == len(runs))
    runs = [replace(run, name=name) for run, name in zip(runs, told, strict=True)]
    runs = [replace(run, arms=tuple(replace(arm, arm=f"{run.name}: {arm.arm}") for arm in run.arms)) for run in runs]
    return Results(tuple(runs), tuple(arm for run in runs for arm in run.arms))


def _load(folder: Path) -> Run:
    file = folder / "results.json"
    if not file.exists():
        raise InputError(f"{folder}: found no results.json; expected the folder of a finished run, such as runs/world")
    try:
        content = json.loads(file.read_text(encoding="utf8"))
        if content.get("format") == FORMAT:
            arms = tuple(ArmResult(**arm) for arm in content["arms"])
            gradients = tuple(GradientsResult(**one) for one in content["gradients"])
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: found no results of mixpo ({type(error).__name__}: {error}); run the recipe again"
        ) from error
    if content.get("format") != FORMAT:
        raise InputError(
            f"{folder}: found a run folder of format {content.get('format')}, written by another version of mixpo; "
            f"expected format {FORMAT}; run the recipe again with out=PATH"
        )
    places = {place for arm in arms for place in [*arm.stages.values(), *arm.trace]}
    for place in places | {one.folder for one in gradients if one.folder}:
        if not (Path(place) / "summary.json").exists():
            raise InputError(f"{place}: found no finished stage there; it was moved or deleted; run the recipe again")
    return Run(folder, content["name"], content["recipe"], arms, gradients, content["mixpo"])


def _refuse_other_prompts(runs: Sequence[Run]) -> None:
    """Arms are compared prompt by prompt, so all must have been asked the same ones."""
    first, expected = "", list[str]()
    for run in runs:
        for arm in run.arms:
            if arm.evaluation is None:
                continue
            here = f"{run.folder}, {arm.name} at seed {arm.seed}"
            prompts = [str(row["prompt"]) for row in read_completions(arm)]
            if not first:
                first, expected = here, prompts
            if prompts != expected:
                place = next((n for n, (a, b) in enumerate(zip(prompts, expected, strict=False)) if a != b), None)
                where = f"they differ from prompt {place + 1} on" if place is not None else "one begins with the other"
                raise InputError(
                    f"{here}: found {len(prompts)} test prompts, {first} has {len(expected)}, and {where}; expected "
                    "the same prompts everywhere; run with the same data and evaluation.prompts"
                )


def read_evaluation(arm: ArmResult) -> dict[str, Any]:
    """The summary of a finished arm's evaluation."""
    assert arm.evaluation is not None
    return read_summary(Path(arm.evaluation))


def read_completions(arm: ArmResult) -> list[dict[str, Any]]:
    """The rows of a finished arm's evaluation, in the order of the test prompts."""
    assert arm.evaluation is not None
    return read_table(Path(arm.evaluation) / "completions.parquet")


@lru_cache(maxsize=4096)
def read_columns(folder: str | None) -> dict[str, Float64[np.ndarray, " prompts"]]:
    """The numbers of an evaluation by column, in the order of the test prompts."""
    assert folder is not None
    rows = read_table(Path(folder) / "completions.parquet")
    names = [name for name, value in rows[0].items() if name not in ("prompt", "completion")]
    found = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}
    for name, values in found.items():
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0]) + 1
            raise InputError(
                f"{folder}/completions.parquet: row {row}: found {name} {values[row - 1]}; expected a finite number; "
                "delete the stage's folder and run again"
            )
    return found


def read_stage_metrics(folder: Path) -> list[dict[str, Any]]:
    """A training stage's metrics, a row a step."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.exists() else []
