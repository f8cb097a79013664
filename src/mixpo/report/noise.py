"""The change of every arm's reward with the share of flipped human labels."""

import itertools

from mixpo.algorithms.intervals import compute_crossed_mean_interval
from mixpo.experiments.results import Results
from mixpo.report import figures
from mixpo.report.comparison import (
    describe_difference,
    describe_sample,
    estimate_differences,
    estimate_mean,
    format_arm_mean,
    format_count,
    format_interval,
    list_sweep_points,
    list_swept_arms,
    note_missing_seeds,
    subtract_arm_values,
)
from mixpo.report.document import Section, SectionGroup, Table

KEY = "label_noise.share"
RIVALS = ("dpo-base", "dpo", "ppo")
"""The arms whose change is compared with MPO's."""

Levels = dict[str, dict[float, str]]
"""The name of the point, by arm and share of flipped labels."""


def build_label_noise_section(results: Results) -> Section | None:
    """The section with mean rewards by share of flipped labels, and their changes; None without a finished sweep."""
    levels: Levels = {arm: dict(list_sweep_points(results, arm, KEY)) for arm in list_swept_arms(results, KEY)}
    finished = [name for points in levels.values() for name in points.values() if results.get_finished_by_seed(name)]
    if not finished:
        return None
    shares = sorted({share for points in levels.values() for share in points})
    measures = results.get_shared_measures(finished)
    headings = ["arm", *(f"{share:.0%} flipped" for share in shares)]
    headings.append(f"change from {shares[0]:.0%} to {shares[-1]:.0%}")
    plots, tables = [], []
    for key, title in measures.items():
        paths, rows = {}, []
        for arm, points in levels.items():
            paths[arm] = [
                figures.Point("", figures.exact_interval(share), estimate_mean(results, name, key))
                for share, name in points.items()
                if results.get_finished_by_seed(name)
            ]
            means = [format_arm_mean(results, points[share], key) if share in points else "" for share in shares]
            rows.append([arm, *means, _format_change(results, points, shares, key)])
        name = f"noise-{key.replace('_', '-')}"
        plots.append(figures.plot_paths(paths, name=name, xlabel="share of labels flipped", ylabel=title))
        tables.append(SectionGroup(title, table=Table(headings, rows)))
    notes = [
        "Flipped are the labels of the human train pairs, which train the reward model and DPO-base. SFT and the test "
        "pairs are unchanged, and the reward model of the unflipped labels scores every arm."
    ]
    opening = _summarize_reward_changes(results, levels, shares, measures)
    return Section("noise", "Label noise", opening, [SectionGroup(figures=plots, notes=notes), *tables])


def _format_change(results: Results, names_by_share: dict[float, str], shares: list[float], column: str) -> str:
    """`−0.30 [−0.50, −0.10]`: an arm's change from the first share of flipped labels to the last, or empty."""
    if not {shares[0], shares[-1]} <= names_by_share.keys():
        return ""
    first, last = names_by_share[shares[0]], names_by_share[shares[-1]]
    if not (seeds := results.list_seeds_with_same_scorer(column, first, last)):
        return ""
    interval = compute_crossed_mean_interval(subtract_arm_values(results, last, first, column, seeds))
    return format_interval(interval) + note_missing_seeds(results, len(seeds), first, last)


def _summarize_reward_changes(results: Results, levels: Levels, shares: list[float], measures: dict[str, str]) -> str:
    """A sentence on each arm's change in reward with label noise, and on mpo's change against its rivals'."""
    key = "true_reward" if "true_reward" in measures else "score"
    changes = {arm: text for arm, points in levels.items() if (text := _format_change(results, points, shares, key))}
    if not changes:
        return f"No arm finished at both {shares[0]:.0%} and {shares[-1]:.0%} of the labels flipped."
    values = ", ".join(f"{arm} {text}" for arm, text in changes.items())
    parts = [f"From {shares[0]:.0%} to {shares[-1]:.0%} flipped labels, the changes in {measures[key]} are: {values}"]
    if missing := [arm for arm in levels if arm not in changes]:
        parts.append(f"not measured at both shares: {', '.join(missing)}")
    paired = []
    for run, arm in itertools.product(results.runs, RIVALS):
        mpo, rival = results.qualify_arm_name(run, "mpo"), results.qualify_arm_name(run, arm)
        if {mpo, rival} <= changes.keys():
            ends = [(levels[one][shares[-1]], levels[one][shares[0]]) for one in (mpo, rival)]
            if seeds := results.list_seeds_with_same_scorer(key, *ends[0], *ends[1]):
                change, other = (subtract_arm_values(results, *names, key, seeds) for names in ends)
                paired.append((mpo, rival, change - other))
    for fall in estimate_differences(paired):
        text = describe_difference(f"change in {measures[key]}", fall.one, fall.other, fall.interval, fall.p)
        parts.append(text + note_missing_seeds(results, fall.seeds, fall.one, fall.other))
    corrected = f"; p corrected for {format_count(len(paired), 'comparison')}" if paired else ""
    return f"{'; '.join(parts)} (95% intervals {describe_sample(results, len(results.seeds))}{corrected})."
