"""At what distance? Reward against KL from SFT, along training and along kl_coef, and arms compared at equal KL."""

from dataclasses import dataclass

import numpy as np

from mixpo.algorithms.statistics import (
    Interval,
    degrees_of_freedom,
    holm,
    percentile_interval,
    resampled_means,
    two_sided_p,
    value_at,
)
from mixpo.report import figures
from mixpo.report.comparison import (
    along,
    difference_text,
    differences,
    interval_text,
    mean_of,
    p_text,
    swept,
    verdict,
)
from mixpo.report.document import Figure, Group, Section, Table
from mixpo.report.results import MEASURES, Results
from mixpo.report.traces import traced

KL_AXIS = "KL from SFT (nats a completion)"
SEEN = 0.95
"""Share of resamples in which the rival's sweep must reach the arm's KL for an interval to be given."""


def section(results: Results) -> Section | None:
    """Arms in the plane of reward and KL, and what is left of their differences at the same KL."""
    if not results.finished:
        return None
    measures = results.measures(results.finished)
    planes = [_plane(results, key, label) for key, label in measures.items()]
    groups = [Group("Reward against KL from SFT", planes)]
    if trails := [figure for key, label in measures.items() if (figure := _trail(results, key, label))]:
        note = "From the policy that PPO starts from to its end: SFT for ppo, the DPO model for mpo."
        groups.append(Group("Along training", trails, notes=[note]))
    if curves := [figure for key, label in measures.items() if (figure := _curve(results, key, label))]:
        groups.append(Group("Along kl_coef", curves, notes=["Beside each point: its kl_coef."]))
    equal = at_equal_kl(results)
    if equal:
        groups.append(Group("At equal KL, by PPO's sweep", table=_equal_table(equal)))
    if (table := _budget_table(results)) is not None:
        groups.append(Group("On the same leash, by ppo.kl_budget", table=table))
    return Section("distance", "Distance", _opening(results, equal), groups)


def _plane(results: Results, key: str, label: str) -> Figure:
    points = [figures.Point(n, mean_of(results, n, "kl_from_sft"), mean_of(results, n, key)) for n in results.plain]
    return figures.plane(points, name=f"kl-{key.replace('_', '-')}", x=KL_AXIS, y=label)


def _trail(results: Results, key: str, label: str) -> Figure | None:
    paths = {
        trace.arm: [figures.Point("", trace.mean("kl_from_sft", n), trace.mean(key, n)) for n in range(trace.points)]
        for trace in traced(results)
    }
    return figures.paths(paths, name=f"kl-{key.replace('_', '-')}-training", x=KL_AXIS, y=label) if paths else None


def _curve(results: Results, key: str, label: str) -> Figure | None:
    paths = {
        arm: [
            figures.Point(f"{value:g}", mean_of(results, name, "kl_from_sft"), mean_of(results, name, key))
            for value, name in along(results, arm, "ppo.kl_coef")
        ]
        for arm in swept(results, "ppo.kl_coef")
    }
    return figures.paths(paths, name=f"kl-{key.replace('_', '-')}-kl-coef", x=KL_AXIS, y=label) if paths else None


@dataclass(frozen=True)
class EqualKL:
    """An arm minus its rival at the rival's kl_coef at which both are equally far from SFT."""

    arm: str
    rival: str
    kl: float
    coef: float
    """The rival's kl_coef there, between those that were run; nan if its sweep does not reach the arm's KL."""
    reach: tuple[float, float]
    """The KL that the rival's sweep spans."""
    found: dict[str, tuple[Interval, float]]
    """By measure: the difference and its p, corrected for the number of arms; empty where it is not reached."""


def at_equal_kl(results: Results, rival: str = "ppo") -> list[EqualKL]:
    """Every arm against the rival's curve of reward over KL, which straight lines join between its kl_coefs.

    All points are resampled together, KL and reward alike, so the interval holds the uncertainty of the distance too.
    """
    curve = along(results, rival, "ppo.kl_coef")
    if len(curve) < 2:
        return []
    names = [name for _, name in curve]
    measures = results.measures(results.finished)
    found = [
        _equal(results, arm, rival, curve, measures)
        for arm in results.plain
        if arm not in (rival, "sft") and results.common_seeds(arm, *names)
    ]
    for key in measures:
        told = [one for one in found if key in one.found]
        for one, p in zip(told, holm([one.found[key][1] for one in told]), strict=True):
            one.found[key] = (one.found[key][0], p)
    return found


def _equal(results: Results, arm: str, rival: str, curve: list[tuple[float, str]], measures: dict[str, str]) -> EqualKL:
    names = [name for _, name in curve]
    seeds = results.common_seeds(arm, *names)
    kls = np.stack([results.values(name, "kl_from_sft", seeds) for name in [*names, arm]])
    drawn = resampled_means(kls)
    means = kls.mean(axis=(1, 2))
    coefs = np.log([[max(value, 1e-12)] for value, _ in curve])
    coef = float(np.exp(value_at(means[:-1, None], coefs, means[-1:]))[0])
    told: dict[str, tuple[Interval, float]] = {}
    for key in measures:
        values = np.stack([results.values(name, key, seeds) for name in [*names, arm]])
        middle = values.mean(axis=(1, 2))
        mean = float(middle[-1] - value_at(means[:-1, None], middle[:-1, None], means[-1:])[0])
        again = resampled_means(values)
        differences = again[-1] - value_at(drawn[:-1], again[:-1], drawn[-1])
        seen = differences[np.isfinite(differences)]
        if np.isfinite(mean) and len(seen) >= SEEN * len(differences):
            df = degrees_of_freedom(values[-1] - values[int(np.argmin(np.abs(means[:-1] - means[-1])))])
            told[key] = (percentile_interval(mean, seen, df=df), two_sided_p(seen, df=df))
    reach = (float(means[:-1].min()), float(means[:-1].max()))
    return EqualKL(arm, rival, float(means[-1]), coef, reach, told)


def _equal_table(equal: list[EqualKL]) -> Table:
    keys = [key for key in MEASURES if any(key in one.found for one in equal)]
    rival = equal[0].rival
    rows = []
    for one in equal:
        cells = [
            text
            for key in keys
            for text in (
                (interval_text(one.found[key][0]), p_text(one.found[key][1])) if key in one.found else ("", "")
            )
        ]
        where = f"{one.coef:.3g}" if np.isfinite(one.coef) else "not reached"
        rows.append([f"{one.arm} − {rival}", f"{one.kl:.2f}", where, *cells])
    low, high = equal[0].reach
    headings = ["arms", "at KL", f"{rival}'s kl_coef there", *(text for key in keys for text in (MEASURES[key], "p"))]
    notes = [
        f"{rival}'s sweep of kl_coef spans {low:.2f} to {high:.2f} nats; between its points straight lines are drawn, "
        "and points and lines are resampled together. Nothing is said of an arm whose KL the sweep does not reach in "
        f"{SEEN:.0%} of the resamples. p corrected for the number of arms (Holm)."
    ]
    return Table(headings, rows, notes)


def _budget_table(results: Results) -> Table | None:
    names = [
        name for name in results.finished if list(next(iter(results.done(name).values())).changes) == ["ppo.kl_budget"]
    ]
    if not names:
        return None
    measures = results.measures(names)
    rows, pairs = [], []
    rivals: dict[float, str] = {}
    for name in names:
        arm = next(iter(results.done(name).values()))
        if arm.arm.rpartition(": ")[2] == "ppo":
            rivals[arm.changes["ppo.kl_budget"]] = name
    for name in names:
        rival = rivals.get(next(iter(results.done(name).values())).changes["ppo.kl_budget"])
        if rival not in (None, name) and results.common_seeds(name, rival):
            pairs.append((name, rival))
    found = {key: differences(results, pairs, key) for key in measures}
    for name in names:
        budget = next(iter(results.done(name).values())).changes["ppo.kl_budget"]
        means = [interval_text(mean_of(results, name, key)) for key in ("kl_from_sft", *measures)]
        against = [difference_text(one) for key in measures for one in found[key] if one.one == name]
        rows.append([name, f"{budget:g}", *means, *(against or [""] * len(measures))])
    headings = [
        "arm",
        "budget",
        "KL reached",
        *measures.values(),
        *(f"{label} minus ppo's" for label in measures.values()),
    ]
    note = (
        "A controller steers the KL from SFT of every arm to the same budget while it trains; the KL reached is that "
        "of the final policy on test prompts. p corrected for the number of comparisons (Holm)."
    )
    return Table(headings, rows, [note])


def _opening(results: Results, equal: list[EqualKL]) -> str:
    mpo = next((one for one in equal if one.arm == "mpo"), None)
    if mpo is None:
        kls = {name: float(results.values(name, "kl_from_sft").mean()) for name in results.plain if name != "sft"}
        if not kls:
            return "No arm but SFT finished."
        near, far = min(kls, key=kls.__getitem__), max(kls, key=kls.__getitem__)
        return (
            f"The arms end between {kls[near]:.2f} ({near}) and {kls[far]:.2f} ({far}) nats from SFT, so their rewards "
            "are not at equal distance; a sweep of ppo.kl_coef lets them be compared at the same KL."
        )
    if not mpo.found:
        return (
            f"mpo ends {mpo.kl:.2f} nats from SFT; PPO's sweep of kl_coef spans {mpo.reach[0]:.2f} to "
            f"{mpo.reach[1]:.2f}, which does not reach it often enough to compare the two at equal KL."
        )
    said = [f"{interval_text(i)} in {MEASURES[key]}, {verdict(i)}" for key, (i, _) in mpo.found.items()]
    return (
        f"At mpo's own distance from SFT, {mpo.kl:.2f} nats, which PPO reaches at a kl_coef of about {mpo.coef:.2g}, "
        f"mpo minus ppo is {'; '.join(said)}."
    )
