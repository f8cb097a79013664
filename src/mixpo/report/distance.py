"""Reward against KL from SFT, along training and along kl_coef, and arms compared at equal KL."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, crossed_estimate, crossed_interval
from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.experiments.results import MEASURES, Results, Run
from mixpo.report import figures
from mixpo.report.comparison import (
    Measure,
    compute_differences,
    describe_difference,
    describe_sample,
    estimate_mean,
    format_arm_label,
    format_difference,
    format_interval,
    format_mean,
    format_p_value,
    list_measures,
    list_sweep_points,
    list_swept_arms,
    note_missing_seeds,
)
from mixpo.report.document import Figure, Group, Section, Table
from mixpo.report.traces import load_traces

KL_AXIS = "KL from SFT (nats per completion)"
ROOT_SCALE_RATIO = 3.0
"""Largest over median KL from which the axis has a square root scale (the distance of Gao et al. 2022)."""


def build_distance_section(results: Results) -> Section | None:
    """The section with reward against KL, and the differences between arms at the same KL."""
    if not results.finished:
        return None
    measures = results.list_shared_measures(results.finished)
    groups = []
    if planes := [figure for measure in list_measures(results) if (figure := _plot_plane(results, measure))]:
        groups.append(Group("Reward against KL from SFT", planes))
    if trails := [figure for key, label in measures.items() if (figure := _plot_training_path(results, key, label))]:
        note = "From the start of PPO (SFT for ppo, the DPO model for mpo) to its end."
        groups.append(Group("Along training", trails, notes=[note]))
    if curves := [figure for key, label in measures.items() if (figure := _plot_kl_coef_path(results, key, label))]:
        groups.append(Group("Along kl_coef", curves, notes=["The number beside each point is its kl_coef."]))
    equal = compare_at_equal_kl(results)
    if equal:
        groups.append(Group("At equal KL, by PPO's sweep", table=_build_equal_kl_table(equal)))
    if (table := _build_budget_table(results)) is not None:
        groups.append(Group("At the same KL budget, by ppo.kl_budget", table=table))
    return Section("distance", "Distance", _write_opening(results, equal), groups)


def _plot_plane(results: Results, measure: Measure) -> Figure | None:
    points = [
        figures.Point(
            format_arm_label(results, name),
            estimate_mean(results, name, "kl_from_sft"),
            estimate_mean(results, name, measure.key),
        )
        for name in measure.names
        if name in results.plain
    ]
    if not points:
        return None
    kls = [abs(point.x.mean) for point in points]
    root = max(kls) > ROOT_SCALE_RATIO * float(np.median(kls))
    scales = [other.names for other in list_measures(results) if other.key == measure.key]
    suffix = f"-{scales.index(measure.names)}" if measure.names != scales[0] else ""
    name = f"kl-{measure.key.replace('_', '-')}{suffix}"
    return figures.plot_plane(points, name=name, x=KL_AXIS, y=measure.title, root=root)


def _plot_training_path(results: Results, key: str, label: str) -> Figure | None:
    paths = {
        trace.arm: [
            figures.Point("", trace.estimate_mean("kl_from_sft", n), trace.estimate_mean(key, n))
            for n in range(trace.num_points)
        ]
        for trace in load_traces(results)
    }
    return figures.plot_paths(paths, name=f"kl-{key.replace('_', '-')}-training", x=KL_AXIS, y=label) if paths else None


def _plot_kl_coef_path(results: Results, key: str, label: str) -> Figure | None:
    paths = {
        arm: [
            figures.Point(f"{value:g}", estimate_mean(results, name, "kl_from_sft"), estimate_mean(results, name, key))
            for value, name in list_sweep_points(results, arm, "ppo.kl_coef")
            if results.finished_by_seed(name)
        ]
        for arm in list_swept_arms(results, "ppo.kl_coef")
    }
    paths = {arm: points for arm, points in paths.items() if points}
    return figures.plot_paths(paths, name=f"kl-{key.replace('_', '-')}-kl-coef", x=KL_AXIS, y=label) if paths else None


@dataclass(frozen=True)
class EqualKL:
    """An arm minus its rival, at the rival's kl_coef that gives both the same KL from SFT."""

    arm: str
    rival: str
    seeds: int
    """The number of seeds at which the arm and every point of the rival's sweep finished."""
    kl: float
    coef: float
    """The rival's interpolated kl_coef; nan if its sweep does not reach the arm's KL."""
    reach: tuple[float, float]
    """The lowest and the highest KL of the rival's sweep."""
    differences: dict[str, tuple[Interval, float]]
    """By measure: the difference and its p, corrected for the number of arms; empty where it is not reached."""


def compare_at_equal_kl(results: Results) -> list[EqualKL]:
    """Differences between every arm and PPO's curve of reward over KL, interpolated linearly between its kl_coefs.

    The interval is of the difference to first order in all means of KL and reward, so it includes the uncertainty of
    the KL. An arm without a seed at which it and all points of the sweep finished is left out.
    """
    measures = results.list_shared_measures(results.finished)
    comparisons = []
    for arm in results.plain:
        run = results.find_run(arm)
        rival, curve = results.qualify_name(run, "ppo"), _list_ppo_sweep(results, run)
        names = [name for _, name in curve]
        if arm in (rival, results.qualify_name(run, "sft")):
            continue
        if len(curve) > 1 and results.list_comparable_seeds("score", arm, *names):
            comparisons.append(_compare_one_at_equal_kl(results, arm, rival, curve, measures))
    for key in measures:
        reached = [comparison.differences for comparison in comparisons if key in comparison.differences]
        for differences, p in zip(reached, correct_by_holm([each[key][1] for each in reached]), strict=True):
            differences[key] = (differences[key][0], p)
    return comparisons


def _list_ppo_sweep(results: Results, run: Run) -> list[tuple[float, str]]:
    return [
        point
        for point in list_sweep_points(results, results.qualify_name(run, "ppo"), "ppo.kl_coef")
        if results.finished_by_seed(point[1])
    ]


def _compare_one_at_equal_kl(
    results: Results, arm: str, rival: str, curve: list[tuple[float, str]], measures: dict[str, str]
) -> EqualKL:
    names = [name for _, name in curve]
    seeds = results.list_comparable_seeds("score", arm, *names)
    kls = np.stack([results.values(name, "kl_from_sft", seeds) for name in [*names, arm]])
    means = kls.mean(axis=(1, 2))
    order = np.argsort(means[:-1])
    coefs = np.array([value for value, _ in curve])[order]
    to, back = (np.log, np.exp) if coefs.min() > 0 else (np.positive, np.positive)
    coef = float(back(np.interp(means[-1], means[order], to(coefs), left=np.nan, right=np.nan)))
    differences: dict[str, tuple[Interval, float]] = {}
    if np.isfinite(coef) and not any(_may_be_negative(kls[a] - kls[b]) for a, b in ((-1, order[0]), (order[-1], -1))):
        for key in measures:
            values = np.stack([results.values(name, key, seeds) for name in [*names, arm]])
            differences[key] = crossed_estimate(_linearize_difference(kls, values))
    reach = (float(means[order[0]]), float(means[order[-1]]))
    return EqualKL(arm, rival, len(seeds), float(means[-1]), coef, reach, differences)


def _may_be_negative(difference: Float64[np.ndarray, "seeds prompts"]) -> bool:
    """True if the interval of a difference in KL reaches zero; a constant difference is exact."""
    return crossed_interval(difference).low <= 0


def _linearize_difference(
    kls: Float64[np.ndarray, "items seeds prompts"], values: Float64[np.ndarray, "items seeds prompts"]
) -> Float64[np.ndarray, "seeds prompts"]:
    """The last item's values minus those interpolated in KL between its neighbours, to first order in values and KL."""
    x, y = kls.mean(axis=(1, 2)), values.mean(axis=(1, 2))
    order = np.argsort(x[:-1])
    i = int(np.clip(np.searchsorted(x[order], x[-1], side="right"), 1, len(order) - 1))
    left, right = order[i - 1], order[i]
    width = x[right] - x[left]
    weight, slope = ((x[-1] - x[left]) / width, (y[right] - y[left]) / width) if width else (0.0, 0.0)
    value_difference, kl_difference = (z[-1] - (1 - weight) * z[left] - weight * z[right] for z in (values, kls))
    return np.asarray(value_difference - slope * kl_difference)


def _build_equal_kl_table(equal: list[EqualKL]) -> Table:
    keys = [key for key in MEASURES if any(key in one.differences for one in equal)]
    rows = []
    for one in equal:
        cells = [
            text
            for key in keys
            for text in (
                (format_interval(one.differences[key][0]), format_p_value(one.differences[key][1]))
                if key in one.differences
                else ("", "")
            )
        ]
        where = f"{one.coef:.3g}" if np.isfinite(one.coef) else "not reached"
        reach = f"{one.reach[0]:.2f} to {one.reach[1]:.2f}"
        rows.append([f"{one.arm} − {one.rival}", str(one.seeds), f"{one.kl:.2f}", reach, where, *cells])
    headings = ["arms", "seeds", "at KL", "reach of PPO's sweep", "PPO's kl_coef there"]
    headings += [text for key in keys for text in (MEASURES[key], "p")]
    notes = [
        "At the seeds at which the arm and all points of the sweep finished. PPO is interpolated linearly between the "
        "points; intervals include the uncertainty of KL. An arm whose KL does not lie significantly inside the sweep "
        "is not compared. p corrected for the number of arms (Holm)."
    ]
    if any(one.arm.endswith("best-of-n") for one in equal):
        notes.append(
            "best-of-n is placed at the upper bound of its KL, so it may be nearer to SFT than the PPO at that KL."
        )
    return Table(headings, rows, notes)


def _build_budget_table(results: Results) -> Table | None:
    budgets = {one.name: one for one in results.arms if list(one.changes) == ["ppo.kl_budget"]}
    finished = [name for name in budgets if results.finished_by_seed(name)]
    if not finished:
        return None
    rivals = {
        name: other
        for name, one in budgets.items()
        for other, rival in budgets.items()
        if rival.arm == results.qualify_name(results.find_run(name), "ppo")
        and rival.changes == one.changes
        and other != name
    }
    measures = results.list_shared_measures(finished)
    differences = {
        key: {
            each.one: format_difference(results, each)
            for each in compute_differences(results, list(rivals.items()), key)
        }
        for key in measures
    }
    rows = []
    for name, one in budgets.items():
        means = [format_mean(results, name, key) for key in ("kl_from_sft", *measures)]
        against = [differences[key].get(name, "") for key in measures]
        rows.append([name, f"{one.changes['ppo.kl_budget']:g}", *means, *against])
    headings = ["arm", "budget", "KL reached", *measures.values()]
    headings += [f"{title} minus ppo" for title in measures.values()]
    note = (
        "A controller steers the KL from SFT of every arm to the same budget during training; the KL reached is that "
        "of the final policy on test prompts. p corrected for the number of comparisons (Holm)."
    )
    return Table(headings, rows, [note])


def _write_opening(results: Results, equal: list[EqualKL]) -> str:
    mpo = results.find_first_name("mpo")
    one = next((one for one in equal if one.arm == mpo), equal[0] if equal else None)
    if one is None:
        base = {results.qualify_name(run, "sft") for run in results.runs}
        kls = {n: float(results.values(n, "kl_from_sft").mean()) for n in results.plain if n not in base}
        if not kls:
            return "No arm of the recipe other than SFT finished, so there are no KLs to compare."
        near, far = min(kls, key=kls.__getitem__), max(kls, key=kls.__getitem__)
        text = f"{far} ends {kls[far]:.2f} nats from SFT"
        if near != far:
            text = f"between {kls[near]:.2f} ({near}) and {kls[far]:.2f} ({far}) nats from SFT"
        points = [list_sweep_points(results, results.qualify_name(run, "ppo"), "ppo.kl_coef") for run in results.runs]
        why = (
            "PPO's sweep of kl_coef has too few finished points to compare them at the same KL"
            if any(len(each) > 1 for each in points)
            else "a sweep of ppo.kl_coef would compare them at the same KL"
        )
        if near == far:
            return f"{text}."
        return f"The arms ended at different KL, so their rewards are not directly comparable: {text}; {why}."
    if not one.differences:
        return (
            f"{one.arm} and {one.rival} are not compared at equal KL: {one.arm} ends {one.kl:.2f} nats from SFT, "
            f"and PPO's sweep of kl_coef reaches only {one.reach[0]:.2f} to {one.reach[1]:.2f}."
        )
    texts = "; ".join(
        describe_difference(MEASURES[key], one.arm, one.rival, interval, p)
        for key, (interval, p) in one.differences.items()
    )
    seeds = results.list_common_seeds(
        one.arm, *(name for _, name in _list_ppo_sweep(results, results.find_run(one.arm)))
    )
    return (
        f"At equal KL, {texts}. {one.arm} ends {one.kl:.2f} nats from SFT, which PPO reaches at a kl_coef of about "
        f"{one.coef:.2g}; intervals are {describe_sample(results, seeds)}"
        f"{note_missing_seeds(results, one.seeds, one.arm, one.rival)}."
    )
