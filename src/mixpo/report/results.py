"""A finished run as the report reads it: `results.json` and the folders that it names."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mixpo.data.errors import InputError
from mixpo.experiments.run import FORMAT, ArmResult
from mixpo.stages.engine import read_summary
from mixpo.stages.rows import read_table


@dataclass(frozen=True)
class Results:
    """A run. Everything else is read from its stages' folders when it is asked for."""

    folder: Path
    name: str
    recipe: dict[str, Any]
    arms: tuple[ArmResult, ...]
    mixpo: str

    @cached_property
    def names(self) -> list[str]:
        """The arms in the recipe's order."""
        return list(dict.fromkeys(arm.arm for arm in self.arms))

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds in the recipe's order."""
        return list(dict.fromkeys(arm.seed for arm in self.arms))

    def of(self, name: str) -> list[ArmResult]:
        """An arm at every seed."""
        return [arm for arm in self.arms if arm.arm == name]

    def stage(self, kind: str, seed: int) -> Path | None:
        """The folder of a stage that all arms of a seed share, such as RewardModel; None if it is not there."""
        for arm in self.arms:
            for key, folder in arm.stages.items():
                if arm.seed == seed and key.startswith(f"{kind}-") and (Path(folder) / "summary.json").exists():
                    return Path(folder)
        return None


def load(folder: Path) -> Results:
    """Read a run's folder. Raises `InputError` if it is none, or of another version."""
    file = folder / "results.json"
    if not file.exists():
        raise InputError(f"{folder}: found no results.json; expected the folder of a finished run, such as runs/world")
    content = json.loads(file.read_text(encoding="utf8"))
    if content.get("format") != FORMAT:
        raise InputError(
            f"{folder}: found a run folder of format {content.get('format')}, written by another version of mixpo; "
            f"expected format {FORMAT}; run the recipe again with out=PATH"
        )
    arms = tuple(ArmResult(**arm) for arm in content["arms"])
    for place in {place for arm in arms for place in arm.stages.values()}:
        if not (Path(place) / "summary.json").exists():
            raise InputError(f"{place}: found no finished stage there; it was moved or deleted; run the recipe again")
    return Results(folder, content["name"], content["recipe"], arms, content["mixpo"])


def evaluation(arm: ArmResult) -> dict[str, Any]:
    """The summary of a finished arm's evaluation."""
    assert arm.evaluation is not None
    return read_summary(Path(arm.evaluation))


def completions(arm: ArmResult) -> list[dict[str, Any]]:
    """The rows of a finished arm's evaluation, in the order of the test prompts."""
    assert arm.evaluation is not None
    return read_table(Path(arm.evaluation) / "completions.parquet")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """A training stage's metrics, a row a step."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.exists() else []
