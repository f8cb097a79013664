"""Reward against KL from SFT, along training and along kl_coef, and arms compared at equal KL."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import compute_crossed_mean_interval
from mixpo.experiments.results import MEASURES, Results
from mixpo.report import figures
from mixpo.report.comparison import (
    ArmDifference,
    SeedsByPrompts,
    compare_arm_pairs,
    describe_difference,
    describe_sample,
    estimate_differences,
    estimate_kl_and_mean,
    format_arm_label,
    format_arm_mean,
    format_difference,
    format_difference_cells,
    list_finished_sweep_points,
    list_measures_by_scale,
    list_sweep_points,
    list_swept_arms,
    name_arm_of_same_run,
    note_missing_seeds,
)
from mixpo.report.document import Figure, Section, SectionGroup, Table
from mixpo.report.traces import load_ppo_traces

KL_AXIS = "KL from SFT (nats per completion)"
KL_COEF = "ppo.kl_coef"
ROOT_SCALE_RATIO = 3.0
"""Largest over median KL from which the axis has a square root scale (the distance of Gao et al. 2022)."""


def build_distance_section(results: Results) -> Section | None:
    """The section with reward against KL from SFT, and differences of arms at equal KL; None if no arm finished."""
    if not results.finished_arms:
        return None
    measures = results.get_shared_measures(results.finished_arms)
    groups = []
    if planes := _plot_reward_against_kl(results):
        groups.append(SectionGroup("Reward against KL from SFT", planes))
    if traces := load_ppo_traces(results):
        trails = {key: {trace.arm: trace.list_kl_points(key) for trace in traces} for key in measures}
        note = "From the start of PPO (SFT for ppo, the DPO model for mpo) to its end."
        groups.append(SectionGroup("Along training", _plot_kl_paths_by_measure(trails, "training"), notes=[note]))
    swept = {arm: list_finished_sweep_points(results, arm, KL_COEF) for arm in list_swept_arms(results, KL_COEF)}
    if any(swept.values()):
        curves = {
            key: {
                arm: [estimate_kl_and_mean(results, name, key, f"{value:g}") for value, name in points]
                for arm, points in swept.items()
                if points
            }
            for key in measures
        }
        note = "The number beside each point is its kl_coef."
        groups.append(SectionGroup("Along kl_coef", _plot_kl_paths_by_measure(curves, "kl-coef"), notes=[note]))
    comparisons = compare_at_equal_kl(results)
    if comparisons:
        groups.append(SectionGroup("At equal KL, by PPO's sweep", table=_build_equal_kl_table(comparisons)))
    if (table := _build_kl_budget_table(results)) is not None:
        groups.append(SectionGroup("At the same KL budget, by ppo.kl_budget", table=table))
    return Section("distance", "Distance", _describe_equal_kl(results, comparisons), groups)


def _plot_reward_against_kl(results: Results) -> list[Figure]:
    """Figures of the recipe's arms by KL from SFT (x) and mean reward (y), one for every reward scale."""
    planes, scales = [], Counter[str]()
    for measure in list_measures_by_scale(results):
        key, arms = measure.key, [name for name in measure.names if name in results.finished_recipe_arms]
        name = f"kl-{key.replace('_', '-')}{f'-{scales[key]}' if scales[key] else ''}"
        scales[key] += 1
        if arms:
            points = [estimate_kl_and_mean(results, arm, key, format_arm_label(results, arm)) for arm in arms]
            kls = [abs(point.x.mean) for point in points]
            root = max(kls) > ROOT_SCALE_RATIO * float(np.median(kls))
            planes.append(figures.plot_points(points, name=name, xlabel=KL_AXIS, ylabel=measure.title, sqrt_x=root))
    return planes


def _plot_kl_paths_by_measure(paths: Mapping[str, Mapping[str, Sequence[figures.Point]]], suffix: str) -> list[Figure]:
    """Figures of arms' paths over KL from SFT (x) and mean reward (y), one for every reward column."""
    return [
        figures.plot_paths(by_arm, name=f"kl-{key.replace('_', '-')}-{suffix}", xlabel=KL_AXIS, ylabel=MEASURES[key])
        for key, by_arm in paths.items()
    ]


@dataclass(frozen=True)
class EqualKLComparison:
    """An arm minus its rival PPO, interpolated in a sweep of kl_coef to the arm's KL from SFT."""

    arm: str
    rival: str
    seeds: int
    """The number of seeds at which the arm and every point of the rival's sweep finished."""
    kl: float
    coef: float
    """The rival's interpolated kl_coef; nan if its sweep does not reach the arm's KL."""
    reach: tuple[float, float]
    """The lowest and the highest KL of the rival's sweep."""
    differences: dict[str, ArmDifference]
    """By measure, p corrected for the number of arms; empty where the KL is not reached."""


def compare_at_equal_kl(results: Results) -> list[EqualKLComparison]:
    """Every arm minus PPO at the arm's KL, PPO's reward being interpolated linearly in KL between its kl_coefs.

    The interval is to first order in all means of KL and reward, so it includes the uncertainty of the KL. Arms without
    a seed at which they and all points of the sweep finished are left out.
    """
    comparisons = []
    paired: dict[str, list[tuple[str, str, SeedsByPrompts]]] = {}
    for arm in results.finished_recipe_arms:
        rival = name_arm_of_same_run(results, arm, "ppo")
        curve = list_finished_sweep_points(results, rival, KL_COEF)
        names = [*(name for _, name in curve), arm]
        seeds = results.list_seeds_with_same_scorer("score", *names)
        if arm in (rival, name_arm_of_same_run(results, arm, "sft")) or len(curve) < 2 or not seeds:
            continue
        kls = np.stack([results.get_evaluation_column(name, "kl_from_sft", seeds) for name in names])
        means = kls.mean(axis=(1, 2))
        order = np.argsort(means[:-1])
        coefs = np.array([value for value, _ in curve])[order]
        to, back = (np.log, np.exp) if coefs.min() > 0 else (np.positive, np.positive)
        coef = float(back(np.interp(means[-1], means[order], to(coefs), left=np.nan, right=np.nan)))
        reach = (float(means[order[0]]), float(means[order[-1]]))
        comparisons.append(EqualKLComparison(arm, rival, len(seeds), float(means[-1]), coef, reach, {}))
        margins = [compute_crossed_mean_interval(kls[a] - kls[b]).low for a, b in ((-1, order[0]), (order[-1], -1))]
        if np.isfinite(coef) and not any(low <= 0 for low in margins):  # nan where all are alike: exact
            for key in results.get_shared_measures(results.finished_arms):
                values = np.stack([results.get_evaluation_column(name, key, seeds) for name in names])
                paired.setdefault(key, []).append((arm, rival, _linearize_difference_at_equal_kl(kls, values)))
    by_arm = {comparison.arm: comparison for comparison in comparisons}
    for key, values_by_arm in paired.items():
        for difference in estimate_differences(values_by_arm):
            by_arm[difference.one].differences[key] = difference
    return comparisons


def _linearize_difference_at_equal_kl(
    kls: Float64[np.ndarray, "items seeds prompts"], values: Float64[np.ndarray, "items seeds prompts"]
) -> SeedsByPrompts:
    """The last item's values minus the others' interpolated at its KL, to first order, an array of seeds by prompts."""
    x, y = kls.mean(axis=(1, 2)), values.mean(axis=(1, 2))
    order = np.argsort(x[:-1])
    i = int(np.clip(np.searchsorted(x[order], x[-1], side="right"), 1, len(order) - 1))
    left, right = order[i - 1], order[i]
    width = x[right] - x[left]
    weight, slope = ((x[-1] - x[left]) / width, (y[right] - y[left]) / width) if width else (0.0, 0.0)
    value_difference, kl_difference = (z[-1] - (1 - weight) * z[left] - weight * z[right] for z in (values, kls))
    return np.asarray(value_difference - slope * kl_difference)


def _build_equal_kl_table(comparisons: list[EqualKLComparison]) -> Table:
    """A row for every comparison: the arm's KL, the sweep's KLs, PPO's kl_coef there, and the difference by measure."""
    keys = [key for key in MEASURES if any(key in one.differences for one in comparisons)]
    rows = []
    for one in comparisons:
        cells = [text for key in keys for text in format_difference_cells(one.differences.get(key))]
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
    if any(one.arm.endswith("best-of-n") for one in comparisons):
        notes.append(
            "best-of-n is placed at the upper bound of its KL, so it may be nearer to SFT than the PPO at that KL."
        )
    return Table(headings, rows, notes)


def _build_kl_budget_table(results: Results) -> Table | None:
    """A row for every arm in a sweep of ppo.kl_budget: KL reached, means, difference from PPO; None without one."""
    budgets = {one.name: one for one in results.arms if list(one.changes) == ["ppo.kl_budget"]}
    finished = [name for name in budgets if results.get_finished_by_seed(name)]
    if not finished:
        return None
    pairs = [
        (name, other)
        for name, one in budgets.items()
        for other, rival in budgets.items()
        if rival.arm == name_arm_of_same_run(results, name, "ppo") and rival.changes == one.changes and other != name
    ]
    measures = results.get_shared_measures(finished)
    differences = [compare_arm_pairs(results, pairs, key) for key in measures]
    against = {pair[0]: [format_difference(results, by_pair.get(pair)) for by_pair in differences] for pair in pairs}
    rows = []
    for name, one in budgets.items():
        means = [format_arm_mean(results, name, key) for key in ("kl_from_sft", *measures)]
        rows.append([name, f"{one.changes['ppo.kl_budget']:g}", *means, *against.get(name, [""] * len(measures))])
    headings = ["arm", "budget", "KL reached", *measures.values()]
    headings += [f"{title} minus ppo" for title in measures.values()]
    note = (
        "A controller steers the KL from SFT of every arm to the same budget during training; the KL reached is that "
        "of the final policy on test prompts. p corrected for the number of comparisons (Holm)."
    )
    return Table(headings, rows, [note])


def _describe_equal_kl(results: Results, comparisons: list[EqualKLComparison]) -> str:
    """A sentence on mpo (else the first arm) against PPO at equal KL; without comparisons, on the KLs of the arms."""
    mpo = results.find_finished_name("mpo")
    one = next((one for one in comparisons if one.arm == mpo), comparisons[0] if comparisons else None)
    if one is None:
        base = {results.qualify_arm_name(run, "sft") for run in results.runs}
        kls = {
            n: float(results.get_evaluation_column(n, "kl_from_sft").mean())
            for n in results.finished_recipe_arms
            if n not in base
        }
        if not kls:
            return "No arm of the recipe other than SFT finished, so there are no KLs to compare."
        near, far = min(kls, key=kls.__getitem__), max(kls, key=kls.__getitem__)
        if near == far:
            return f"{far} ends {kls[far]:.2f} nats from SFT."
        points = [list_sweep_points(results, results.qualify_arm_name(run, "ppo"), KL_COEF) for run in results.runs]
        why = "a sweep of ppo.kl_coef would compare them at the same KL"
        if any(len(each) > 1 for each in points):
            why = "PPO's sweep of kl_coef has too few finished points to compare them at the same KL"
        return (
            "The arms ended at different KL, so their rewards are not directly comparable: between "
            f"{kls[near]:.2f} ({near}) and {kls[far]:.2f} ({far}) nats from SFT; {why}."
        )
    if not one.differences:
        return (
            f"{one.arm} and {one.rival} are not compared at equal KL: {one.arm} ends {one.kl:.2f} nats from SFT, "
            f"and PPO's sweep of kl_coef reaches only {one.reach[0]:.2f} to {one.reach[1]:.2f}."
        )
    texts = "; ".join(
        describe_difference(MEASURES[key], one.arm, one.rival, difference.interval, difference.p)
        for key, difference in one.differences.items()
    )
    return (
        f"At equal KL, {texts}. {one.arm} ends {one.kl:.2f} nats from SFT, which PPO reaches at a kl_coef of about "
        f"{one.coef:.2g}; intervals are {describe_sample(results, one.seeds)}"
        f"{note_missing_seeds(results, one.seeds, one.arm, one.rival)}."
    )
