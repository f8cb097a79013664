"""Evaluations of arms along their PPO: at its start, at its snapshots and at its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, compute_crossed_mean_interval
from mixpo.experiments.results import Results, read_columns, read_stage_metrics
from mixpo.experiments.run import ArmResult
from mixpo.report import figures
from mixpo.stages.stage_cache import read_stage_summary


@dataclass(frozen=True)
class Trace:
    """The evaluations of an arm along its PPO, at the seeds that have all points."""

    arm: str
    results: Sequence[ArmResult]
    """One a seed."""

    @property
    def seeds(self) -> list[int]:
        """The seeds."""
        return [one.seed for one in self.results]

    def select_seeds(self, seeds: Sequence[int]) -> "Trace":
        """The trace at some of its seeds."""
        return Trace(self.arm, [self.results[self.seeds.index(seed)] for seed in seeds])

    @property
    def num_points(self) -> int:
        """The number of evaluations, start and end included."""
        return len(self.results[0].trace) + 1

    def values(self, key: str, point: int) -> Float64[np.ndarray, "seeds prompts"]:
        """A column of the evaluations at a point, counted from the start."""
        return np.stack([read_columns([*one.trace, one.evaluation][point])[key] for one in self.results])

    def estimate_mean(self, key: str, point: int) -> Interval:
        """The mean of a column at a point."""
        return compute_crossed_mean_interval(self.values(key, point))

    def list_points(self, key: str) -> list[figures.Point]:
        """KL from SFT and the mean of a column at every point."""
        points = range(self.num_points)
        return [figures.Point("", self.estimate_mean("kl_from_sft", n), self.estimate_mean(key, n)) for n in points]

    @cached_property
    def completions_sampled(self) -> Float64[np.ndarray, " points"]:
        """The number of completions sampled by PPO up to each point, averaged over seeds."""
        by_seed = []
        for one in self.results:
            ppo = Path([place for key, place in one.stages.items() if key.startswith("PPO-")][-1])
            counts = [row["completions"] for row in read_stage_metrics(ppo)]
            steps = [0, *read_stage_summary(ppo)["snapshots"], len(counts)]
            by_seed.append([float(sum(counts[:step])) for step in steps])
        return np.asarray(np.mean(by_seed, axis=0))


def load_traces(results: Results) -> list[Trace]:
    """The traces of all arms that were evaluated along their training."""
    traces = []
    for name in results.plain:
        if own := [arm for arm in results.finished_by_seed(name).values() if arm.trace and arm.evaluation]:
            traces.append(Trace(name, own))
    return traces
