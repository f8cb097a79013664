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
class PPOTrace:
    """An arm's evaluations along its PPO (start, snapshots, end) at the seeds that have all of them."""

    arm: str
    results: Sequence[ArmResult]
    """One a seed."""

    @property
    def seeds(self) -> list[int]:
        """Seeds of the evaluations."""
        return [one.seed for one in self.results]

    def select_seeds(self, seeds: Sequence[int]) -> "PPOTrace":
        """A copy with only these of its seeds, in this order."""
        return PPOTrace(self.arm, [self.results[self.seeds.index(seed)] for seed in seeds])

    @property
    def evaluations_per_seed(self) -> int:
        """Number of evaluations at each seed, start and end included."""
        return len(self.results[0].trace) + 1

    def read_values(self, column: str, evaluation_index: int) -> Float64[np.ndarray, "seeds prompts"]:
        """A column of the evaluation with this index (0 the start of PPO, -1 its end), an array of seeds by prompts."""
        return np.stack([read_columns([*one.trace, one.evaluation][evaluation_index])[column] for one in self.results])

    def estimate_mean_at(self, column: str, evaluation_index: int) -> Interval:
        """Mean of a column over seeds and prompts at an evaluation (0 the start, -1 the end), with its 95% interval."""
        return compute_crossed_mean_interval(self.read_values(column, evaluation_index))

    def list_kl_points(self, column: str) -> list[figures.Point]:
        """Figure points of all evaluations in order: KL from SFT (x) and the mean of a column (y)."""
        mean, indices = self.estimate_mean_at, range(self.evaluations_per_seed)
        return [figures.Point("", mean("kl_from_sft", n), mean(column, n)) for n in indices]

    @cached_property
    def completions_sampled(self) -> Float64[np.ndarray, " points"]:
        """Number of completions that PPO sampled up to each evaluation, averaged over seeds."""
        by_seed = []
        for one in self.results:
            ppo = Path([place for key, place in one.stages.items() if key.startswith("PPO-")][-1])
            counts = [row["completions"] for row in read_stage_metrics(ppo)]
            steps = [0, *read_stage_summary(ppo)["snapshots"], len(counts)]
            by_seed.append([float(sum(counts[:step])) for step in steps])
        return np.asarray(np.mean(by_seed, axis=0))


def load_ppo_traces(results: Results) -> list[PPOTrace]:
    """A trace for every arm of the recipe that was evaluated along its PPO; empty if none was."""
    traces = []
    for name in results.finished_recipe_arms:
        if own := [arm for arm in results.get_finished_by_seed(name).values() if arm.trace and arm.evaluation]:
            traces.append(PPOTrace(name, own))
    return traces
