"""At what distance? Reward against KL from SFT, along training and along kl_coef, and arms compared at equal KL."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, crossed_estimate, crossed_interval
from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.experiments.results import MEASURES, Results, Run
from mixpo.report import figures
from mixpo.report.comparison import (
    along,
    difference_text,
    differences,
    fewer,
    interval_text,
    label,
    mean_of,
    mean_text,
    over,
    p_text,
    swept,
    verdict,
)
from mixpo.report.document import Figure, Group, Section, Table
from mixpo.report.traces import traced

KL_AXIS = "KL from SFT (nats a completion)"
WIDE = 3.0
"""Where the largest KL is that many times the median, the plane's axis shows roots (a distance in Gao et al. 2022)."""


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


def _plane(results: Results, key: str, title: str) -> Figure:
    points = [
        figures.Point(label(results, name), mean_of(results, name, "kl_from_sft"), mean_of(results, name, key))
        for name in results.plain
    ]
    kls = [abs(point.x.mean) for point in points]
    root = bool(kls) and max(kls) > WIDE * float(np.median(kls))
    return figures.plane(points, name=f"kl-{key.replace('_', '-')}", x=KL_AXIS, y=title, root=root)


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
            if results.done(name)
        ]
        for arm in swept(results, "ppo.kl_coef")
    }
    paths = {arm: points for arm, points in paths.items() if points}
    return figures.paths(paths, name=f"kl-{key.replace('_', '-')}-kl-coef", x=KL_AXIS, y=label) if paths else None


@dataclass(frozen=True)
class EqualKL:
    """An arm minus its rival at the rival's kl_coef at which both are equally far from SFT."""

    arm: str
    rival: str
    seeds: int
    """At which the arm and every point of the rival's sweep finished."""
    kl: float
    coef: float
    """The rival's kl_coef there, between those that were run; nan if its sweep does not reach the arm's KL."""
    reach: tuple[float, float]
    """The KL that the rival's sweep spans."""
    found: dict[str, tuple[Interval, float]]
    """By measure: the difference and its p, corrected for the number of arms; empty where it is not reached."""


def at_equal_kl(results: Results) -> list[EqualKL]:
    """Every arm against PPO's curve of reward over KL in its run, which straight lines join between its kl_coefs.

    The interval is that of the difference to first order in all means, KL and reward alike, so it holds the uncertainty
    of the distance too. Without a seed at which the arm and all points finished, an arm is left out.
    """
    measures = results.measures(results.finished)
    found = []
    for arm in results.plain:
        run = results.run_of(arm)
        rival, curve = results.named(run, "ppo"), _sweep_of_ppo(results, run)
        names = [name for _, name in curve]
        usual = arm not in (rival, results.named(run, "sft"))
        if usual and len(curve) > 1 and results.comparable("score", arm, *names):
            found.append(_equal(results, arm, rival, curve, measures))
    for key in measures:
        told = [one for one in found if key in one.found]
        for one, p in zip(told, correct_by_holm([one.found[key][1] for one in told]), strict=True):
            one.found[key] = (one.found[key][0], p)
    return found


def _sweep_of_ppo(results: Results, run: Run) -> list[tuple[float, str]]:
    return [point for point in along(results, results.named(run, "ppo"), "ppo.kl_coef") if results.done(point[1])]


def _equal(results: Results, arm: str, rival: str, curve: list[tuple[float, str]], measures: dict[str, str]) -> EqualKL:
    names = [name for _, name in curve]
    seeds = results.comparable("score", arm, *names)
    kls = np.stack([results.values(name, "kl_from_sft", seeds) for name in [*names, arm]])
    means = kls.mean(axis=(1, 2))
    order = np.argsort(means[:-1])
    coefs = np.array([value for value, _ in curve])[order]
    to, back = (np.log, np.exp) if coefs.min() > 0 else (np.positive, np.positive)
    coef = float(back(np.interp(means[-1], means[order], to(coefs), left=np.nan, right=np.nan)))
    told: dict[str, tuple[Interval, float]] = {}
    if np.isfinite(coef) and not any(_may_be_below_zero(kls[a] - kls[b]) for a, b in ((-1, order[0]), (order[-1], -1))):
        for key in measures:
            values = np.stack([results.values(name, key, seeds) for name in [*names, arm]])
            told[key] = crossed_estimate(_linear(kls, values))
    reach = (float(means[order[0]]), float(means[order[-1]]))
    return EqualKL(arm, rival, len(seeds), float(means[-1]), coef, reach, told)


def _may_be_below_zero(difference: Float64[np.ndarray, "seeds prompts"]) -> bool:
    """Whether the interval of a KL above another reaches zero; what is the same on every prompt is exact."""
    return crossed_interval(difference).low <= 0


def _linear(
    kls: Float64[np.ndarray, "items seeds prompts"], values: Float64[np.ndarray, "items seeds prompts"]
) -> Float64[np.ndarray, "seeds prompts"]:
    """The last item's values over the line of its two neighbours in KL, to first order in all of them and in KL."""
    x, y = kls.mean(axis=(1, 2)), values.mean(axis=(1, 2))
    order = np.argsort(x[:-1])
    place = int(np.clip(np.searchsorted(x[order], x[-1], side="right"), 1, len(order) - 1))
    left, right = order[place - 1], order[place]
    width = x[right] - x[left]
    weight, slope = ((x[-1] - x[left]) / width, (y[right] - y[left]) / width) if width else (0.0, 0.0)
    over, further = (z[-1] - (1 - weight) * z[left] - weight * z[right] for z in (values, kls))
    return np.asarray(over - slope * further)


def _equal_table(equal: list[EqualKL]) -> Table:
    keys = [key for key in MEASURES if any(key in one.found for one in equal)]
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
        reach = f"{one.reach[0]:.2f} to {one.reach[1]:.2f}"
        rows.append([f"{one.arm} − {one.rival}", str(one.seeds), f"{one.kl:.2f}", reach, where, *cells])
    headings = ["arms", "seeds", "at KL", "reach of PPO's sweep", "PPO's kl_coef there"]
    headings += [text for key in keys for text in (MEASURES[key], "p")]
    notes = [
        "Of the seeds at which the arm and all points of the sweep finished. Between the points straight lines are "
        "drawn; intervals hold the uncertainty of both. Nothing is said of an arm whose KL is not told apart from the "
        "ends of the sweep. p corrected for the number of arms (Holm)."
    ]
    if any(one.arm.endswith("best-of-n") for one in equal):
        notes.append(
            "best-of-n stands at the upper bound of its KL: it may be nearer to SFT than the PPO it is held to."
        )
    return Table(headings, rows, notes)


def _budget_table(results: Results) -> Table | None:
    budgets = {one.name: one for one in results.arms if list(one.changes) == ["ppo.kl_budget"]}
    finished = [name for name in budgets if results.done(name)]
    if not finished:
        return None
    rivals = {
        name: other
        for name, one in budgets.items()
        for other, rival in budgets.items()
        if rival.arm == results.named(results.run_of(name), "ppo") and rival.changes == one.changes and other != name
    }
    measures = results.measures(finished)
    found = {
        key: {one.one: difference_text(results, one) for one in differences(results, list(rivals.items()), key)}
        for key in measures
    }
    rows = []
    for name, one in budgets.items():
        means = [mean_text(results, name, key) for key in ("kl_from_sft", *measures)]
        against = [found[key].get(name, "") for key in measures]
        rows.append([name, f"{one.changes['ppo.kl_budget']:g}", *means, *against])
    headings = ["arm", "budget", "KL reached", *measures.values()]
    headings += [f"{title} minus ppo's" for title in measures.values()]
    note = (
        "A controller steers the KL from SFT of every arm to the same budget while it trains; the KL reached is that "
        "of the final policy on test prompts. p corrected for the number of comparisons (Holm)."
    )
    return Table(headings, rows, [note])


def _opening(results: Results, equal: list[EqualKL]) -> str:
    mpo = results.first("mpo")
    one = next((one for one in equal if one.arm == mpo), equal[0] if equal else None)
    if one is None:
        base = {results.named(run, "sft") for run in results.runs}
        kls = {n: float(results.values(n, "kl_from_sft").mean()) for n in results.plain if n not in base}
        if not kls:
            return "No arm of the recipe but SFT finished, so there is no distance to compare."
        near, far = min(kls, key=kls.__getitem__), max(kls, key=kls.__getitem__)
        said = f"{far} ends {kls[far]:.2f} nats from SFT"
        if near != far:
            said = f"The arms end between {kls[near]:.2f} ({near}) and {kls[far]:.2f} ({far}) nats from SFT"
        points = [along(results, results.named(run, "ppo"), "ppo.kl_coef") for run in results.runs]
        why = (
            "PPO's sweep of kl_coef has too few points that finished to compare"
            if any(len(each) > 1 for each in points)
            else "no sweep of PPO's kl_coef compares"
        )
        return f"{said}; the rewards are not of one distance, and {why} them at the same KL."
    where = f"{one.arm} ends {one.kl:.2f} nats from SFT"
    if not one.found:
        return (
            f"{where}; PPO's sweep of kl_coef spans {one.reach[0]:.2f} to {one.reach[1]:.2f}, which does not "
            "reach it beyond the intervals, so the two are not compared at equal KL."
        )
    said = "; ".join(f"in {MEASURES[key]} {verdict(i, p)}" for key, (i, p) in one.found.items())
    seeds = results.common_seeds(one.arm, *(name for _, name in _sweep_of_ppo(results, results.run_of(one.arm))))
    return (
        f"{where}, which PPO reaches at a kl_coef of about {one.coef:.2g}; there {one.arm} minus {one.rival} is {said} "
        f"(95% intervals {over(results, seeds)}{fewer(results, one.seeds, one.arm, one.rival)})."
    )
