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
SeedsByPrompts = Float64[np.ndarray, "seeds prompts"]
LEVEL = 0.05
NOT_ESTIMABLE = "not estimable"
"""In a cell whose value too few or too uniform data leave open."""


@dataclass(frozen=True)
class ArmDifference:
    """The mean of one arm minus another, prompt by prompt at their common seeds, with its interval and corrected p."""

    one: str
    other: str
    seeds: int
    interval: Interval
    p: float
    """Of no difference, corrected for the number of differences in the same call (Holm 1979)."""

    @property
    def significant_sign(self) -> int:
        """1 or -1 if the difference is significant, else 0."""
        return find_significant_sign(self.interval, self.p)


@dataclass(frozen=True)
class Measure:
    """A reward column of the evaluations, its title, and the names of the arms whose values are on one scale."""

    key: str
    title: str
    names: list[str]


def list_measures_by_scale(results: Results) -> list[Measure]:
    """Every reward column of the finished arms, once for each reward model that gave it, since their scales differ."""
    measures = []
    for key, title in MEASURES.items():
        groups: list[list[str]] = []
        for name in (name for name in results.finished_arms if results.have_column([name], key)):
            group = next((group for group in groups if _have_same_reward_scale(results, key, group[0], name)), None)
            groups.append([name]) if group is None else group.append(name)
        runs = [results.find_run_of_arm(group[0]).name for group in groups]
        owners = runs if len(set(runs)) == len(runs) else [group[0] for group in groups]
        titles = [title] if len(groups) == 1 else [f"{title} (model of {owner})" for owner in owners]
        measures += [Measure(key, *each) for each in zip(titles, groups, strict=True)]
    return measures


def _have_same_reward_scale(results: Results, column: str, one: str, other: str) -> bool:
    """True if one reward model scored both arms at all common seeds; without such a seed, if they are of one run."""
    seeds = results.list_common_seeds(one, other)
    if not seeds:
        return results.find_run_of_arm(one) is results.find_run_of_arm(other)
    return results.list_seeds_with_same_scorer(column, one, other) == seeds


def estimate_mean(results: Results, arm: str, column: str) -> Interval:
    """An arm's mean of an evaluation column (a share where it is 0 or 1) with 95% interval over prompts and seeds."""
    values = results.get_evaluation_column(arm, column)
    if column in SHARES:
        return wilson_interval_over_seeds(values.sum(axis=1).tolist(), [values.shape[1]] * len(values))
    return compute_crossed_mean_interval(values)


def name_arm_of_same_run(results: Results, arm: str, sibling: str) -> str:
    """The name of another arm, such as `sft`, in the run of this arm, whether or not it was run."""
    return results.qualify_arm_name(results.find_run_of_arm(arm), sibling)


def estimate_kl_and_mean(results: Results, arm: str, column: str, label: str) -> figures.Point:
    """A labelled point for figures: an arm's KL from SFT (x) and mean of an evaluation column (y), with intervals."""
    return figures.Point(label, estimate_mean(results, arm, "kl_from_sft"), estimate_mean(results, arm, column))


def subtract_arm_values(results: Results, one: str, other: str, column: str, seeds: Sequence[int]) -> SeedsByPrompts:
    """Evaluation column of arm `one` minus that of arm `other`, an array of seeds by prompts."""
    return np.asarray(
        results.get_evaluation_column(one, column, seeds) - results.get_evaluation_column(other, column, seeds)
    )


def compare_arm_pairs(results: Results, arm_pairs: Sequence[Pair], column: str) -> dict[Pair, ArmDifference]:
    """Mean paired differences by pair of arms, p corrected for their number; pairs of no comparable seed left out."""
    paired = []
    for one, other in arm_pairs:
        if seeds := results.list_seeds_with_same_scorer(column, one, other):
            paired.append((one, other, subtract_arm_values(results, one, other, column, seeds)))
    return {(each.one, each.other): each for each in estimate_differences(paired)}


def estimate_differences(paired: Sequence[tuple[str, str, SeedsByPrompts]]) -> list[ArmDifference]:
    """The mean of each (one arm, other arm, values of one minus other), with interval and p corrected for all."""
    estimates = [(one, other, len(values), *estimate_crossed_mean(values)) for one, other, values in paired]
    corrected = correct_by_holm([p for *_, p in estimates])
    return [ArmDifference(*estimate[:4], p) for estimate, p in zip(estimates, corrected, strict=True)]


def format_number(value: float, spec: str = ".2f") -> str:
    """`−1.50`: a number with a true minus sign (U+2212), and no minus before zero."""
    return format(value, f"{spec[:1] if spec[:1] == '+' else ''}z{spec.removeprefix('+')}").replace("-", "−")


def format_interval(interval: Interval, spec: str = ".2f") -> str:
    """`1.23 [1.10, 1.36]`: mean and bounds; the mean alone if the bounds are nan."""
    mean, low, high = (format_number(value, spec) for value in (interval.mean, interval.low, interval.high))
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def format_arm_mean(results: Results, arm: str, column: str) -> str:
    """An arm's mean and interval, with ` (2 of 3 seeds)` where some seeds failed; `failed` where all did."""
    if not (seeds := len(results.get_finished_by_seed(arm))):
        return "failed"
    return format_interval(estimate_mean(results, arm, column)) + note_missing_seeds(results, seeds, arm)


def note_missing_seeds(results: Results, seed_count: int, *arms: str) -> str:
    """` (2 of 3 seeds)` if the arms ran at more seeds than `seed_count`; empty otherwise."""
    ran = len(results.list_run_seeds(*arms))
    return f" ({seed_count} of {format_count(ran, 'seed')})" if seed_count < ran else ""


def format_arm_label(results: Results, arm: str) -> str:
    """An arm's name, with ` (failed at 1 of 3 seeds)` if it failed at some."""
    ran, done = results.list_arm_results(arm), results.get_finished_by_seed(arm)
    return arm if len(done) == len(ran) else f"{arm} (failed at {len(ran) - len(done)} of {len(ran)} seeds)"


def format_estimate(interval: Interval | None) -> str:
    """`0.50 [0.40, 0.60]`, or `not estimable` for None or a nan mean."""
    return NOT_ESTIMABLE if interval is None or math.isnan(interval.mean) else format_interval(interval)


def format_p_value(p: float) -> str:
    """`0.034`, `0.34`, or `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def format_difference_cells(difference: ArmDifference | None) -> list[str]:
    """Two table cells, the difference with its interval and its p; both empty for None."""
    return ["", ""] if difference is None else [format_interval(difference.interval), format_p_value(difference.p)]


def format_difference(results: Results, difference: ArmDifference | None) -> str:
    """`0.12 [0.05, 0.19] (p 0.002)`, with ` (2 of 3 seeds)` where some failed; empty for None."""
    if difference is None:
        return ""
    text = f"{format_interval(difference.interval)} (p {format_p_value(difference.p)})"
    return text + note_missing_seeds(results, difference.seeds, difference.one, difference.other)


def format_count(count: int, noun: str) -> str:
    """`1 claim`, `3 claims`: a count and its noun, which takes an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def join_names(names: Sequence[str]) -> str:
    """Names as an enumeration in a sentence: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def find_significant_sign(interval: Interval, corrected_p: float) -> int:
    """1 or -1 if the interval excludes zero and p is below 0.05, else 0; 0 too if the bounds are nan."""
    if math.isnan(interval.low) or corrected_p >= LEVEL or interval.low <= 0 <= interval.high:
        return 0
    return 1 if interval.low > 0 else -1


def describe_difference(measure_title: str, one: str, other: str, interval: Interval, p: float) -> str:
    """`mpo has a significantly higher reward than ppo (+0.12, …)`, or `no significant difference between … (…)`."""
    mean = format_number(interval.mean, "+.2f")
    if math.isnan(interval.low):
        return f"{one} minus {other} in {measure_title} is {mean} on every prompt, so it has no interval"
    bounds = f"[{format_number(interval.low)}, {format_number(interval.high)}]"
    evidence = f"({mean}, 95% CI {bounds}, p {format_p_value(p)})"
    if sign := find_significant_sign(interval, p):
        return f"{one} has a significantly {'higher' if sign > 0 else 'lower'} {measure_title} than {other} {evidence}"
    return f"no significant difference between {one} and {other} in {measure_title} {evidence}"


def describe_sample(results: Results, seed_count: int) -> str:
    """What an interval is over, such as `over 256 prompts and 5 seeds`; one seed adds `other seeds may differ`."""
    count = format_count(results.get_evaluation_column(results.finished_arms[0], "score").shape[1], "prompt")
    return f"over {count} " + ("at one seed; other seeds may differ" if seed_count == 1 else f"and {seed_count} seeds")


def list_sweep_points(results: Results, arm: str, setting: str) -> list[tuple[float, str]]:
    """(value, arm name) of an arm in the sweep of one setting (`ppo.kl_coef`) alone, by value; finished or not."""
    if arm not in results.arm_names:
        return []
    section, _, last = setting.partition(".")
    points = {arm: results.find_run_of_arm(arm).recipe[section].get(last)}
    for result in results.arms:
        if result.arm == arm and list(result.changes) == [setting]:
            points[result.name] = result.changes[setting]
    return sorted((float(value), name) for name, value in points.items() if value is not None)


def list_finished_sweep_points(results: Results, arm: str, setting: str) -> list[tuple[float, str]]:
    """(value, arm name) of an arm in the sweep of one setting alone, by value, where one seed or more finished."""
    return [point for point in list_sweep_points(results, arm, setting) if results.get_finished_by_seed(point[1])]


def list_swept_arms(results: Results, setting: str) -> list[str]:
    """Names of the recipe's arms for which a sweep of one setting alone gives two values or more."""
    plain = [name for name in results.arm_names if not results.list_arm_results(name)[0].changes]
    return [arm for arm in plain if len(list_sweep_points(results, arm, setting)) > 1]
