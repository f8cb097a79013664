"""What the tables compare: means over prompts and seeds, paired differences, corrected p-values, and their words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, crossed_estimate, crossed_interval, share_interval
from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.experiments.results import SHARES, Results

LEVEL = 0.05
UNTOLD = "cannot be told"
"""In a cell for what there is too little to say of."""


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
    """An arm's mean of a column, or its share, with its 95% interval over prompts and seeds."""
    values = results.values(name, key)
    if key in SHARES:
        return share_interval(values.sum(axis=1).tolist(), [values.shape[1]] * len(values))
    return crossed_interval(values)


def differences(results: Results, pairs: Sequence[tuple[str, str]], key: str) -> list[Difference]:
    """Paired differences of a column, in the order of `pairs`; those without a comparable seed are left out."""
    found = []
    for one, other in pairs:
        if seeds := results.comparable(key, one, other):
            found.append((one, other, results.values(one, key, seeds) - results.values(other, key, seeds)))
    return estimated(found)


def estimated(found: Sequence[tuple[str, str, Float64[np.ndarray, "seeds prompts"]]]) -> list[Difference]:
    """Differences of two arms from their paired values, each p corrected for the number of them."""
    made = [(one, other, len(values), *crossed_estimate(values)) for one, other, values in found]
    corrected = correct_by_holm([p for *_, p in made])
    return [Difference(*made[place][:4], p) for place, p in enumerate(corrected)]


def mean_text(results: Results, name: str, key: str) -> str:
    """An arm's mean with its interval; how many seeds it is of where some failed, `failed` where all did."""
    if not results.done(name):
        return "failed"
    return interval_text(mean_of(results, name, key)) + fewer(results, len(results.done(name)), name)


def fewer(results: Results, seeds: int, *names: str) -> str:
    """` (2 of 3 seeds)` where so many seeds are not all at which the arms were run."""
    ran = len(results.ran(*names))
    return f" ({seeds} of {counted(ran, 'seed')})" if seeds < ran else ""


def label(results: Results, name: str) -> str:
    """An arm's name, with the number of seeds at which it failed."""
    ran, done = results.of(name), results.done(name)
    return name if len(done) == len(ran) else f"{name} (failed at {len(ran) - len(done)} of {len(ran)} seeds)"


def interval_text(interval: Interval) -> str:
    """`1.23 [1.10, 1.36]`."""
    if math.isnan(interval.low):
        return f"{interval.mean:.2f}"
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def p_text(p: float) -> str:
    """`0.034`; what is smaller than a thousandth as a bound."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def difference_text(results: Results, difference: Difference) -> str:
    """`0.12 [0.05, 0.19] (p 0.002)`, and how many seeds it is of where some failed."""
    said = f"{interval_text(difference.interval)} (p {p_text(difference.p)})"
    return said + fewer(results, difference.seeds, difference.one, difference.other)


def counted(count: int, thing: str) -> str:
    """`1 claim`, `3 claims`."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def sign(interval: Interval, p: float) -> int:
    """1 or -1 where the interval excludes zero and the corrected p is small; 0 where the two are not told apart."""
    if math.isnan(interval.low) or p >= LEVEL or interval.low <= 0 <= interval.high:
        return 0
    return 1 if interval.low > 0 else -1


def verdict(interval: Interval, p: float) -> str:
    """A paired difference, and what it lets one say: `0.12 [0.05, 0.19] (p 0.002), above zero`."""
    if math.isnan(interval.low):
        return f"{interval_text(interval)}, of values all alike, which have no interval"
    said = {1: "above zero", -1: "below zero", 0: "which does not tell the two apart"}[sign(interval, p)]
    return f"{interval_text(interval)} (p {p_text(p)}), {said}"


def over(results: Results, seeds: Sequence[int]) -> str:
    """What an interval speaks of: `over 256 prompts and 5 seeds`."""
    count = next(iter(results.values(name, "score").shape[1] for name in results.finished))
    if len(seeds) == 1:
        return f"over {count} prompts at one seed, so it says nothing of other seeds"
    return f"over {count} prompts and {len(seeds)} seeds"


def along(results: Results, arm: str, key: str) -> list[tuple[float, str]]:
    """An arm of the recipe and its points of the sweep of one setting alone, finished or not: value and name."""
    if arm not in results.names:
        return []
    section, _, last = key.partition(".")
    points = {arm: results.run_of(arm).recipe[section].get(last)}
    for one in results.arms:
        if one.arm == arm and list(one.changes) == [key]:
            points[one.name] = one.changes[key]
    return sorted((float(value), name) for name, value in points.items() if value is not None)


def swept(results: Results, key: str) -> list[str]:
    """The arms of the recipe that have points in the sweep of one setting alone."""
    plain = [name for name in results.names if not results.of(name)[0].changes]
    return [arm for arm in plain if len(along(results, arm, key)) > 1]
