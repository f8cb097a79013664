"""How do noisy labels matter? Every arm's fall as a share of the human labels is flipped."""

from mixpo.algorithms.intervals import Interval, crossed_interval
from mixpo.experiments.results import Results
from mixpo.report import figures
from mixpo.report.comparison import (
    along,
    counted,
    estimated,
    fewer,
    interval_text,
    mean_of,
    mean_text,
    over,
    swept,
    verdict,
)
from mixpo.report.document import Group, Section, Table

KEY = "label_noise.share"
RIVALS = ("dpo-base", "dpo", "ppo")
"""Whose change MPO's is held against."""

Levels = dict[str, dict[float, str]]
"""By arm and share of flipped labels: the name of that point."""


def section(results: Results) -> Section | None:
    """Means and changes by share."""
    levels: Levels = {arm: dict(along(results, arm, KEY)) for arm in swept(results, KEY)}
    finished = [name for points in levels.values() for name in points.values() if results.done(name)]
    if not finished:
        return None
    shares = sorted({share for points in levels.values() for share in points})
    measures = results.measures(finished)
    pictures = [
        figures.paths(
            {
                arm: [
                    figures.Point("", figures.exactly(share), mean_of(results, name, key))
                    for share, name in points.items()
                    if results.done(name)
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
            means = [mean_text(results, points[share], key) if share in points else "" for share in shares]
            rows.append([arm, *means, _change_text(results, points, shares, key)])
        headings = ["arm", *(f"{share:.0%} flipped" for share in shares)]
        headings.append(f"change from {shares[0]:.0%} to {shares[-1]:.0%}")
        tables.append(Group(title, table=Table(headings, rows)))
    notes = [
        "Labels of the human train pairs are flipped for the reward model, and for DPO-base directly; SFT and the test "
        "pairs stay clean, and every arm is scored by the reward model of the unflipped labels."
    ]
    return Section(
        "noise",
        "Label noise",
        _opening(results, levels, shares, measures),
        [Group(figures=pictures, notes=notes), *tables],
    )


def change(results: Results, points: dict[float, str], shares: list[float], key: str) -> tuple[Interval, int] | None:
    """What a column of an arm changes by from the first share to the last, paired by prompt and seed; the seeds."""
    if not {shares[0], shares[-1]} <= points.keys():
        return None
    first, last = points[shares[0]], points[shares[-1]]
    seeds = results.comparable(key, first, last)
    if not seeds:
        return None
    return crossed_interval(results.values(last, key, seeds) - results.values(first, key, seeds)), len(seeds)


def _change_text(results: Results, points: dict[float, str], shares: list[float], key: str) -> str:
    found = change(results, points, shares, key)
    if found is None:
        return ""
    return interval_text(found[0]) + fewer(results, found[1], points[shares[0]], points[shares[-1]])


def _opening(results: Results, levels: Levels, shares: list[float], measures: dict[str, str]) -> str:
    key = "true_reward" if "true_reward" in measures else "score"
    changes = {arm: text for arm, points in levels.items() if (text := _change_text(results, points, shares, key))}
    if not changes:
        return f"No arm finished both with {shares[0]:.0%} and with {shares[-1]:.0%} of the labels flipped."
    said = ", ".join(f"{arm} {text}" for arm, text in changes.items())
    parts = [f"From {shares[0]:.0%} to {shares[-1]:.0%} of labels flipped {measures[key]} changes by: {said}"]
    if missing := [arm for arm in levels if arm not in changes]:
        parts.append(f"not measured at both: {', '.join(missing)}")
    found = []
    for mpo, rival in ((results.named(run, "mpo"), results.named(run, arm)) for run in results.runs for arm in RIVALS):
        if mpo not in changes or rival not in changes:
            continue
        ends = [levels[arm][share] for arm in (mpo, rival) for share in (shares[-1], shares[0])]
        if seeds := results.comparable(key, *ends):
            a, b, c, d = (results.values(name, key, seeds) for name in ends)
            found.append((mpo, rival, (a - b) - (c - d)))
    for apart in estimated(found):
        few = fewer(results, apart.seeds, apart.one, apart.other)
        parts.append(f"{apart.one}'s change minus {apart.other}'s is {verdict(apart.interval, apart.p)}{few}")
    corrected = f"; p corrected for {counted(len(found), 'comparison')}" if found else ""
    return f"{'; '.join(parts)} (95% intervals {over(results, results.seeds)}{corrected})."
