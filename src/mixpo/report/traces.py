"""Evaluations of arms along their PPO: at its start, at its snapshots and at its end."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, crossed_interval
from mixpo.experiments.results import Results, read_columns, read_stage_metrics
from mixpo.report import figures
from mixpo.stages.stage_cache import read_summary


@dataclass(frozen=True)
class Trace:
    """The evaluations of an arm along its PPO, at the seeds that have all points."""

    arm: str
    seeds: list[int]
    evaluations: list[list[str]]
    """By seed: the folders of the evaluations, from the start to the end."""
    ppo: list[Path]
    """By seed: the folder of the PPO stage."""

    def select_seeds(self, seeds: list[int]) -> "Trace":
        """The trace at some of its seeds."""
        indices = [self.seeds.index(seed) for seed in seeds]
        return Trace(self.arm, seeds, [self.evaluations[i] for i in indices], [self.ppo[i] for i in indices])

    @property
    def num_points(self) -> int:
        """The number of evaluations, start and end included."""
        return len(self.evaluations[0])

    def values(self, key: str, point: int) -> Float64[np.ndarray, "seeds prompts"]:
        """A column of the evaluations at a point, counted from the start."""
        return np.stack([read_columns(folders[point])[key] for folders in self.evaluations])

    def estimate_mean(self, key: str, point: int) -> Interval:
        """The mean of a column at a point."""
        return crossed_interval(self.values(key, point))

    def list_points(self, key: str) -> list[figures.Point]:
        """KL from SFT and the mean of a column at every point."""
        points = range(self.num_points)
        return [figures.Point("", self.estimate_mean("kl_from_sft", n), self.estimate_mean(key, n)) for n in points]

    @cached_property
    def completions_sampled(self) -> Float64[np.ndarray, " points"]:
        """The number of completions sampled by PPO up to each point, averaged over seeds."""
        by_seed = []
        for ppo in self.ppo:
            counts = [row["completions"] for row in read_stage_metrics(ppo)]
            steps = [0, *read_summary(ppo)["snapshots"], len(counts)]
            by_seed.append([float(sum(counts[:step])) for step in steps])
        return np.asarray(np.mean(by_seed, axis=0))


def load_traces(results: Results) -> list[Trace]:
    """The traces of all arms that were evaluated along their training."""
    traces = []
    for name in results.plain:
        arms = [arm for arm in results.finished_by_seed(name).values() if arm.trace and arm.evaluation]
        if arms:
            stages = [{key.partition("-")[0]: Path(place) for key, place in arm.stages.items()} for arm in arms]
            evaluations = [[*arm.trace, str(arm.evaluation)] for arm in arms]
            traces.append(Trace(name, [arm.seed for arm in arms], evaluations, [kinds["PPO"] for kinds in stages]))
    return traces
