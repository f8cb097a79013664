"""Means over prompts and seeds, paired differences, corrected p-values, and the sentences that state them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import (
    Interval,
    compute_crossed_mean_interval,
    estimate_crossed_mean,
    wilson_interval_over_seeds,
)
from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.experiments.results import MEASURES, SHARES, Results
from mixpo.report import figures

Pair = tuple[str, str]
"""The names of two arms."""
LEVEL = 0.05
NOT_ESTIMABLE = "not estimable"
"""In a cell whose value too few or too uniform data leave open."""


@dataclass(frozen=True)
class Difference:
    """One arm minus another, prompt by prompt at the seeds that both finished."""

    one: str
    other: str
    seeds: int
    interval: Interval
    p: float
    """Of no difference, corrected for the number of differences in the same call (Holm 1979)."""

    @property
    def sign(self) -> int:
        """1 or -1 where the difference is significant, else 0."""
        return find_significant_sign(self.interval, self.p)


@dataclass(frozen=True)
class Measure:
    """A column of the evaluations and the arms whose values are on one scale."""

    key: str
    title: str
    names: list[str]


def list_measures(results: Results) -> list[Measure]:
    """Every measure of the finished arms; a reward once for each reward model, since their scales differ."""
    measures = []
    for key, title in MEASURES.items():
        groups: list[list[str]] = []
        for name in (name for name in results.finished if results.have_column([name], key)):
            group = next((group for group in groups if _share_scale(results, key, group[0], name)), None)
            groups.append([name]) if group is None else group.append(name)
        runs = [results.find_run(group[0]).name for group in groups]
        owners = runs if len(set(runs)) == len(runs) else [group[0] for group in groups]
        titles = [title] if len(groups) == 1 else [f"{title} (model of {owner})" for owner in owners]
        measures += [Measure(key, *each) for each in zip(titles, groups, strict=True)]
    return measures


def _share_scale(results: Results, key: str, one: str, other: str) -> bool:
    """True if one model scored both arms wherever both finished; without a common seed, whether they are of one run."""
    seeds = results.list_common_seeds(one, other)
    if not seeds:
        return results.find_run(one) is results.find_run(other)
    return results.list_comparable_seeds(key, one, other) == seeds


def estimate_mean(results: Results, name: str, key: str) -> Interval:
    """An arm's mean of a column, or its share, with its 95% interval over prompts and seeds."""
    values = results.values(name, key)
    if key in SHARES:
        return wilson_interval_over_seeds(values.sum(axis=1).tolist(), [values.shape[1]] * len(values))
    return compute_crossed_mean_interval(values)


def find_sibling(results: Results, name: str, arm: str) -> str:
    """The name of another arm in the run of an arm."""
    return results.qualify_name(results.find_run(name), arm)


def estimate_point(results: Results, name: str, key: str, label: str) -> figures.Point:
    """An arm's KL from SFT and its mean of a column, under a label."""
    return figures.Point(label, estimate_mean(results, name, "kl_from_sft"), estimate_mean(results, name, key))


def subtract_values(
    results: Results, one: str, other: str, key: str, seeds: Sequence[int]
) -> Float64[np.ndarray, "seeds prompts"]:
    """One arm's column minus another's, prompt by prompt."""
    return np.asarray(results.values(one, key, seeds) - results.values(other, key, seeds))


def compute_differences(results: Results, pairs: Sequence[Pair], key: str) -> dict[Pair, Difference]:
    """Paired differences of a column by pair of arms, without the pairs that have no comparable seed."""
    paired = []
    for one, other in pairs:
        if seeds := results.list_comparable_seeds(key, one, other):
            paired.append((one, other, subtract_values(results, one, other, key, seeds)))
    return {(each.one, each.other): each for each in estimate_differences(paired)}


def estimate_differences(paired: Sequence[tuple[str, str, Float64[np.ndarray, "seeds prompts"]]]) -> list[Difference]:
    """Differences of two arms from their paired values, each p corrected for the number of them."""
    estimates = [(one, other, len(values), *estimate_crossed_mean(values)) for one, other, values in paired]
    corrected = correct_by_holm([p for *_, p in estimates])
    return [Difference(*estimate[:4], p) for estimate, p in zip(estimates, corrected, strict=True)]


def format_number(value: float, spec: str = ".2f") -> str:
    """A number with a true minus sign, and no minus before zero: `−1.50`."""
    return format(value, f"{spec[:1] if spec[:1] == '+' else ''}z{spec.removeprefix('+')}").replace("-", "−")


def format_interval(interval: Interval, spec: str = ".2f") -> str:
    """`1.23 [1.10, 1.36]`."""
    mean, low, high = (format_number(value, spec) for value in (interval.mean, interval.low, interval.high))
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def format_mean(results: Results, name: str, key: str) -> str:
    """An arm's mean with its interval and the number of its seeds where some failed; `failed` where all did."""
    if not (seeds := len(results.finished_by_seed(name))):
        return "failed"
    return format_interval(estimate_mean(results, name, key)) + note_missing_seeds(results, seeds, name)


def note_missing_seeds(results: Results, seeds: int, *names: str) -> str:
    """` (2 of 3 seeds)` where the arms ran at more seeds than this; empty otherwise."""
    ran = len(results.list_run_seeds(*names))
    return f" ({seeds} of {format_count(ran, 'seed')})" if seeds < ran else ""


def format_arm_label(results: Results, name: str) -> str:
    """An arm's name, with the number of seeds at which it failed."""
    ran, done = results.list_arm_results(name), results.finished_by_seed(name)
    return name if len(done) == len(ran) else f"{name} (failed at {len(ran) - len(done)} of {len(ran)} seeds)"


def format_estimate(interval: Interval | None) -> str:
    """An interval, or `not estimable` where there is none or its estimate is nan."""
    return NOT_ESTIMABLE if interval is None or math.isnan(interval.mean) else format_interval(interval)


def format_p_value(p: float) -> str:
    """`0.034`; what is smaller than a thousandth as a bound."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def format_with_p(difference: Difference | None) -> list[str]:
    """Two cells, of a difference and of its p; empty where there is no difference."""
    return ["", ""] if difference is None else [format_interval(difference.interval), format_p_value(difference.p)]


def format_difference(results: Results, difference: Difference | None) -> str:
    """`0.12 [0.05, 0.19] (p 0.002)`, with the number of its seeds where some failed; empty for None."""
    if difference is None:
        return ""
    text = f"{format_interval(difference.interval)} (p {format_p_value(difference.p)})"
    return text + note_missing_seeds(results, difference.seeds, difference.one, difference.other)


def format_count(count: int, noun: str) -> str:
    """`1 claim`, `3 claims`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def join_names(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def find_significant_sign(interval: Interval, p: float) -> int:
    """1 or -1 where the interval excludes zero and the corrected p is small; 0 where the difference is not significant.

    An interval with the bound nan is of values that are all alike: never significant.
    """
    if math.isnan(interval.low) or p >= LEVEL or interval.low <= 0 <= interval.high:
        return 0
    return 1 if interval.low > 0 else -1


def describe_difference(measure: str, one: str, other: str, interval: Interval, p: float) -> str:
    """`mpo has a significantly higher reward than ppo (+0.12, 95% CI [0.05, 0.19], p 0.002)`.

    `no significant difference between mpo and ppo in reward (…)` where the interval or p does not show one.
    """
    mean = format_number(interval.mean, "+.2f")
    if math.isnan(interval.low):
        return f"{one} minus {other} in {measure} is {mean} on every prompt, so it has no interval"
    bounds = f"[{format_number(interval.low)}, {format_number(interval.high)}]"
    evidence = f"({mean}, 95% CI {bounds}, p {format_p_value(p)})"
    if sign := find_significant_sign(interval, p):
        return f"{one} has a significantly {'higher' if sign > 0 else 'lower'} {measure} than {other} {evidence}"
    return f"no significant difference between {one} and {other} in {measure} {evidence}"


def describe_sample(results: Results, seeds: int) -> str:
    """The sample of an interval: `over 256 prompts and 5 seeds`."""
    prompts = format_count(results.values(results.finished[0], "score").shape[1], "prompt")
    return f"over {prompts} at one seed; other seeds may differ" if seeds == 1 else f"over {prompts} and {seeds} seeds"


def list_sweep_points(results: Results, arm: str, key: str) -> list[tuple[float, str]]:
    """An arm of the recipe and its points in the sweep of one setting alone, finished or not: value and name."""
    if arm not in results.names:
        return []
    section, _, last = key.partition(".")
    points = {arm: results.find_run(arm).recipe[section].get(last)}
    for result in results.arms:
        if result.arm == arm and list(result.changes) == [key]:
            points[result.name] = result.changes[key]
    return sorted((float(value), name) for name, value in points.items() if value is not None)


def list_finished_points(results: Results, arm: str, key: str) -> list[tuple[float, str]]:
    """The points of an arm's sweep (see `list_sweep_points`) that finished at one seed or more."""
    return [point for point in list_sweep_points(results, arm, key) if results.finished_by_seed(point[1])]


def list_swept_arms(results: Results, key: str) -> list[str]:
    """The arms of the recipe that have points in the sweep of one setting alone."""
    plain = [name for name in results.names if not results.list_arm_results(name)[0].changes]
    return [arm for arm in plain if len(list_sweep_points(results, arm, key)) > 1]
