"""What the tables compare: means over prompts and seeds, paired differences, corrected p-values, and their words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixpo.algorithms.statistics import (
    Interval,
    crossed_interval,
    degrees_of_freedom,
    holm,
    resampled_means,
    two_sided_p,
)
from mixpo.report.results import Results

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """One arm minus another, prompt by prompt at the seeds that both finished."""

    one: str
    other: str
    seeds: int
    interval: Interval
    p: float
    """Of no difference, corrected for the number of differences that it was asked for with (Holm 1979)."""


def mean_of(results: Results, name: str, key: str) -> Interval:
    """An arm's mean of a column, with its 95% interval over prompts and seeds."""
    return crossed_interval(results.values(name, key))


def differences(results: Results, pairs: Sequence[tuple[str, str]], key: str) -> list[Difference]:
    """Paired differences of a column, in the order of `pairs`; those without a common seed are left out."""
    found: list[tuple[str, str, int, Interval, float]] = []
    for one, other in pairs:
        seeds = results.common_seeds(one, other)
        if seeds:
            values = results.values(one, key, seeds) - results.values(other, key, seeds)
            p = two_sided_p(resampled_means(values[None])[0], df=degrees_of_freedom(values))
            found.append((one, other, len(seeds), crossed_interval(values), p))
    corrected = holm([p for *_, p in found])
    return [Difference(*found[place][:4], p) for place, p in enumerate(corrected)]


def interval_text(interval: Interval) -> str:
    """`1.23 [1.10, 1.36]`."""
    if math.isnan(interval.low):
        return f"{interval.mean:.2f}"
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def p_text(p: float) -> str:
    """`0.034`; what the number of resamples cannot resolve as a bound."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def difference_text(difference: Difference) -> str:
    """`0.12 [0.05, 0.19] (p 0.002)`."""
    return f"{interval_text(difference.interval)} (p {p_text(difference.p)})"


def counted(count: int, thing: str) -> str:
    """`1 claim`, `3 claims`."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def sign(difference: Difference) -> int:
    """1 or -1 where the interval excludes zero and the corrected p is small; 0 where the two are not told apart."""
    low, high = difference.interval.low, difference.interval.high
    if math.isnan(low) or difference.p >= LEVEL or low <= 0 <= high:
        return 0
    return 1 if low > 0 else -1


def verdict(interval: Interval) -> str:
    """What a paired interval lets one say."""
    if math.isnan(interval.low):
        return "of one prompt, which has no interval"
    if interval.low > 0:
        return "and the interval lies above zero"
    if interval.high < 0:
        return "and the interval lies below zero"
    return "and the interval holds zero, so these prompts do not tell the two apart"


def over(results: Results, seeds: Sequence[int]) -> str:
    """What an interval speaks of: `over 256 prompts and 5 seeds`."""
    count = next(iter(results.values(name, "score").shape[1] for name in results.finished))
    if len(seeds) == 1:
        return f"over {count} prompts at one seed, so it says nothing of other seeds"
    return f"over {count} prompts and {len(seeds)} seeds"


def along(results: Results, arm: str, key: str) -> list[tuple[float, str]]:
    """An arm of the recipe and its points of the sweep of one setting alone: that setting's value, and the name."""
    own = next((one for one in results.arms if one.name == arm), None)
    if own is None:
        return []
    run = next(run for run in results.runs if any(one is own or one.name == arm for one in run.arms))
    section, _, last = key.partition(".")
    points = {arm: run.recipe[section].get(last)}
    for name in results.finished:
        first = next(iter(results.done(name).values()))
        if first.arm == own.arm and list(first.changes) == [key]:
            points[name] = first.changes[key]
    return sorted(
        (float(value), name) for name, value in points.items() if value is not None and name in results.finished
    )


def swept(results: Results, key: str) -> list[str]:
    """The plain arms that have points in the sweep of one setting alone."""
    return [arm for arm in results.plain if len(along(results, arm, key)) > 1]


def finite(values: np.ndarray) -> bool:
    """Whether no value is missing."""
    return bool(np.isfinite(values).all())
