"""Arms along their training: the evaluations of the start of their PPO, of its snapshots and of its end."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, crossed_interval
from mixpo.experiments.results import Results, read_columns, read_stage_metrics
from mixpo.stages.engine import read_summary


@dataclass(frozen=True)
class Trace:
    """An arm along its PPO at the seeds that have all points."""

    arm: str
    seeds: list[int]
    evaluations: list[list[str]]
    """By seed: the folders of the evaluations, from the start to the end."""
    ppo: list[Path]
    """By seed: the folder of the PPO stage."""

    def at(self, seeds: list[int]) -> "Trace":
        """The same arm at some of its seeds."""
        places = [self.seeds.index(seed) for seed in seeds]
        return Trace(self.arm, seeds, [self.evaluations[n] for n in places], [self.ppo[n] for n in places])

    @property
    def points(self) -> int:
        """How many evaluations there are, start and end included."""
        return len(self.evaluations[0])

    def values(self, key: str, point: int) -> Float64[np.ndarray, "seeds prompts"]:
        """A column of the evaluations at a point."""
        return np.stack([read_columns(folders[point])[key] for folders in self.evaluations])

    def mean(self, key: str, point: int) -> Interval:
        """The mean of a column at a point."""
        return crossed_interval(self.values(key, point))

    @cached_property
    def sampled(self) -> Float64[np.ndarray, " points"]:
        """Completions that PPO had sampled at each point, averaged over seeds."""
        counts: Float64[np.ndarray, "seeds points"] = np.array([_sampled(folder) for folder in self.ppo], np.float64)
        return np.asarray(counts.mean(axis=0))


def _sampled(ppo: Path) -> list[float]:
    counts = [row["completions"] for row in read_stage_metrics(ppo)]
    steps = [0, *read_summary(ppo)["snapshots"], len(counts)]
    return [float(sum(counts[:step])) for step in steps]


def traced(results: Results) -> list[Trace]:
    """Every arm that was evaluated along its training."""
    found = []
    for name in results.plain:
        arms = [arm for arm in results.done(name).values() if arm.trace and arm.evaluation]
        if arms:
            ppo = [
                Path(next(place for key, place in reversed(arm.stages.items()) if key.startswith("PPO-")))
                for arm in arms
            ]
            evaluations = [[*arm.trace, str(arm.evaluation)] for arm in arms]
            found.append(Trace(name, [arm.seed for arm in arms], evaluations, ppo))
    return found
