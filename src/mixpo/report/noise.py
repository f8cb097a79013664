"""How do noisy labels matter? Every arm's fall as a share of the human labels is flipped."""

from mixpo.algorithms.statistics import crossed_interval
from mixpo.report import figures
from mixpo.report.comparison import (
    along,
    interval_text,
    mean_of,
    over,
    swept,
    verdict,
)
from mixpo.report.document import Group, Section, Table
from mixpo.report.results import Results

KEY = "label_noise.share"


def section(results: Results) -> Section | None:
    """Means and falls by share."""
    arms = swept(results, KEY)
    if not arms:
        return None
    levels = {arm: along(results, arm, KEY) for arm in arms}
    measures = results.measures([name for points in levels.values() for _, name in points])
    pictures = [
        figures.paths(
            {
                arm: [figures.Point("", figures.exactly(share), mean_of(results, name, key)) for share, name in points]
                for arm, points in levels.items()
            },
            name=f"noise-{key.replace('_', '-')}",
            x="share of labels flipped",
            y=label,
        )
        for key, label in measures.items()
    ]
    tables = []
    for key, label in measures.items():
        shares = sorted({share for points in levels.values() for share, _ in points})
        rows = []
        for arm, points in levels.items():
            by_share = dict(points)
            means = [interval_text(mean_of(results, by_share[s], key)) if s in by_share else "" for s in shares]
            rows.append([arm, *means, _fall(results, points, key)])
        headings = ["arm", *(f"{share:.0%} flipped" for share in shares), "change from first to last"]
        tables.append(Group(label, table=Table(headings, rows)))
    notes = [
        "Labels of the human train pairs are flipped for the reward model, and for DPO-base directly; SFT and the test "
        "pairs stay clean, and every arm is scored by the reward model of the unflipped labels."
    ]
    return Section(
        "noise", "Label noise", _opening(results, levels, measures), [Group(figures=pictures, notes=notes), *tables]
    )


def _fall(results: Results, points: list[tuple[float, str]], key: str) -> str:
    first, last = points[0][1], points[-1][1]
    seeds = results.common_seeds(first, last)
    return (
        interval_text(crossed_interval(results.values(last, key, seeds) - results.values(first, key, seeds)))
        if seeds
        else ""
    )


def _opening(results: Results, levels: dict[str, list[tuple[float, str]]], measures: dict[str, str]) -> str:
    key = "true_reward" if "true_reward" in measures else "score"
    said = []
    for arm, points in levels.items():
        said.append(f"{arm} {_fall(results, points, key)}")
    last = max(share for points in levels.values() for share, _ in points)
    text = f"With {last:.0%} of the labels flipped {measures[key]} changes by: {', '.join(said)}"
    if "mpo" in levels:
        for rival in ("dpo-base", "dpo", "ppo"):
            if rival in levels and levels[rival][-1][0] == levels["mpo"][-1][0] == last:
                ends = [levels[arm][place][1] for arm in ("mpo", rival) for place in (-1, 0)]
                seeds = results.common_seeds(*ends)
                if seeds:
                    a, b, c, d = (results.values(name, key, seeds) for name in ends)
                    interval = crossed_interval((a - b) - (c - d))
                    text += f"; mpo's change minus {rival}'s is {interval_text(interval)}, {verdict(interval)}"
    seeds = results.common_seeds(*[name for points in levels.values() for _, name in points])
    return f"{text} ({over(results, seeds or results.seeds)})."
