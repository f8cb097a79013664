"""The change of every arm's reward with the share of flipped human labels."""

from mixpo.algorithms.intervals import Interval, crossed_interval
from mixpo.experiments.results import Results
from mixpo.report import figures
from mixpo.report.comparison import (
    describe_difference,
    describe_sample,
    estimate_differences,
    estimate_mean,
    format_count,
    format_interval,
    format_mean,
    list_sweep_points,
    list_swept_arms,
    note_missing_seeds,
)
from mixpo.report.document import Group, Section, Table

KEY = "label_noise.share"
RIVALS = ("dpo-base", "dpo", "ppo")
"""The arms whose change is compared with MPO's."""

Levels = dict[str, dict[float, str]]
"""The name of the point, by arm and share of flipped labels."""


def build_noise_section(results: Results) -> Section | None:
    """The section with means by share of flipped labels, and their changes."""
    levels: Levels = {arm: dict(list_sweep_points(results, arm, KEY)) for arm in list_swept_arms(results, KEY)}
    finished = [name for points in levels.values() for name in points.values() if results.finished_by_seed(name)]
    if not finished:
        return None
    shares = sorted({share for points in levels.values() for share in points})
    measures = results.list_shared_measures(finished)
    plots = [
        figures.plot_paths(
            {
                arm: [
                    figures.Point("", figures.exact_interval(share), estimate_mean(results, name, key))
                    for share, name in points.items()
                    if results.finished_by_seed(name)
                ]
                for arm, points in levels.items()
            },
            name=f"noise-{key.replace('_', '-')}",
            x="share of labels flipped",
            y=title,
        )
        for key, title in measures.items()
    ]
    tables = []
    for key, title in measures.items():
        rows = []
        for arm, points in levels.items():
            means = [format_mean(results, points[share], key) if share in points else "" for share in shares]
            rows.append([arm, *means, _format_change(results, points, shares, key)])
        headings = ["arm", *(f"{share:.0%} flipped" for share in shares)]
        headings.append(f"change from {shares[0]:.0%} to {shares[-1]:.0%}")
        tables.append(Group(title, table=Table(headings, rows)))
    notes = [
        "Flipped are the labels of the human train pairs, which train the reward model and DPO-base. SFT and the test "
        "pairs are unchanged, and the reward model of the unflipped labels scores every arm."
    ]
    return Section(
        "noise",
        "Label noise",
        _write_opening(results, levels, shares, measures),
        [Group(figures=plots, notes=notes), *tables],
    )


def estimate_change(
    results: Results, points: dict[float, str], shares: list[float], key: str
) -> tuple[Interval, int] | None:
    """The change of an arm's column from the first share to the last, paired by prompt and seed, and the seeds."""
    if not {shares[0], shares[-1]} <= points.keys():
        return None
    first, last = points[shares[0]], points[shares[-1]]
    seeds = results.list_comparable_seeds(key, first, last)
    if not seeds:
        return None
    return crossed_interval(results.values(last, key, seeds) - results.values(first, key, seeds)), len(seeds)


def _format_change(results: Results, points: dict[float, str], shares: list[float], key: str) -> str:
    estimate = estimate_change(results, points, shares, key)
    if estimate is None:
        return ""
    interval, seeds = estimate
    return format_interval(interval) + note_missing_seeds(results, seeds, points[shares[0]], points[shares[-1]])


def _write_opening(results: Results, levels: Levels, shares: list[float], measures: dict[str, str]) -> str:
    key = "true_reward" if "true_reward" in measures else "score"
    changes = {arm: text for arm, points in levels.items() if (text := _format_change(results, points, shares, key))}
    if not changes:
        return f"No arm finished at both {shares[0]:.0%} and {shares[-1]:.0%} of the labels flipped."
    values = ", ".join(f"{arm} {text}" for arm, text in changes.items())
    parts = [f"From {shares[0]:.0%} to {shares[-1]:.0%} flipped labels, the changes in {measures[key]} are: {values}"]
    if missing := [arm for arm in levels if arm not in changes]:
        parts.append(f"not measured at both shares: {', '.join(missing)}")
    paired = []
    for mpo, rival in (
        (results.qualify_name(run, "mpo"), results.qualify_name(run, arm)) for run in results.runs for arm in RIVALS
    ):
        if mpo not in changes or rival not in changes:
            continue
        ends = [levels[arm][share] for arm in (mpo, rival) for share in (shares[-1], shares[0])]
        if seeds := results.list_comparable_seeds(key, *ends):
            a, b, c, d = (results.values(name, key, seeds) for name in ends)
            paired.append((mpo, rival, (a - b) - (c - d)))
    for difference in estimate_differences(paired):
        one, other = difference.one, difference.other
        text = describe_difference(f"change in {measures[key]}", one, other, difference.interval, difference.p)
        parts.append(text + note_missing_seeds(results, difference.seeds, one, other))
    corrected = f"; p corrected for {format_count(len(paired), 'comparison')}" if paired else ""
    return f"{'; '.join(parts)} (95% intervals {describe_sample(results, results.seeds)}{corrected})."
