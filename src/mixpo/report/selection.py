"""The split of pairs into easy and hard: gaps, threshold, sizes, correct labels, and examples."""

from collections.abc import Sequence
from typing import Any

from mixpo.algorithms.intervals import wilson_interval
from mixpo.data.rows import convert_to_messages
from mixpo.data.world import true_reward
from mixpo.experiments.results import Results, StageFolder, stages_by_seed
from mixpo.report import figures
from mixpo.report.comparison import format_interval, format_number
from mixpo.report.document import Group, Section, Table
from mixpo.stages.rows import read_table

EXAMPLES = 3
"""Example pairs with the largest, and with the smallest gaps."""


def build_selection_section(results: Results) -> Section | None:
    """The section with every selection of the runs, and a figure of those of the first run's recipe over all seeds."""
    stages = results.list_stages_of_kind("Selection")
    if not stages:
        return None
    parts = {
        stage.key: {part: read_table(stage.folder / f"{part}.parquet") for part in ("easy", "hard")} for stage in stages
    }
    samples = {}
    for stage in stages:  # through an arm that needs both
        keys = next(arm.stages for arm in results.arms if stage.key in arm.stages)
        samples[stage.key] = next(one.summary for one in results.list_stages_of_kind("Samples") if one.key in keys)
    known = all(stage.run.is_world for stage in stages)
    rows = []
    for stage in stages:
        summary, sampled = stage.summary, samples[stage.key]
        gap, sd = sampled["gap_median"], sampled["score_std"]
        row = {
            "selection": stage.label,
            **{key: f"{summary[key]:,}" for key in ("pairs", "easy", "hard")},
            "identical": f"{sampled['identical']:,}",
            "threshold": f"{summary['threshold']:.3g}",
            "median gap": f"{gap:.3g}",
            "median gap / score sd": f"{gap / sd:.2f}" if sd else "",
        }
        if known:
            row |= {f"correct {part} labels": _format_right_share(pairs) for part, pairs in parts[stage.key].items()}
        rows.append(row)
    shown = stages_by_seed(stages)
    histogram = figures.plot_histogram(
        {part: [float(row["gap"]) for stage in shown for row in parts[stage.key][part]] for part in ("hard", "easy")},
        thresholds=[stage.summary["threshold"] for stage in shown],
        name="gaps",
        x="gap between the two scores",
    )
    first = shown[0]
    rows_of_first = sorted(parts[first.key]["easy"] + parts[first.key]["hard"], key=lambda row: float(row["gap"]))
    which = first.label if len(shown) == 1 else f"{len(shown)} seeds together"
    notes = ["Identical: pairs of the same completion twice, with gap 0."]
    if known:
        notes.append(
            "Correct: the chosen completion has the higher true r*. Pairs with a tie in r* are counted separately. "
            "Brackets: Wilson 95% intervals."
        )
    examples = _build_examples_table(rows_of_first, known=known)
    groups = [
        Group(table=Table.from_dicts(rows, notes)),
        Group(f"Gaps ({which})", [histogram]),
        Group(f"Pairs with the largest and the smallest gaps ({first.label})", table=examples),
    ]
    gaps = [samples[stage.key]["gap_median"] for stage in shown]
    opening = _write_opening(shown, gaps, [parts[stage.key] for stage in shown] if known else None)
    return Section("selection", "Selection", opening, groups)


def _count_labels(rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    """The numbers of labels that the true reward confirms, contradicts, and ties."""
    right = wrong = 0
    for row in rows:
        chosen, rejected = _true_rewards(row)
        right, wrong = right + (chosen > rejected), wrong + (chosen < rejected)
    return right, wrong, len(rows) - right - wrong


def _true_rewards(row: dict[str, Any]) -> list[float]:
    return [true_reward(_get_last_message(row), text) for text in row["completions"]]


def _get_last_message(row: dict[str, Any]) -> str:
    return str(convert_to_messages(row["prompt"])[-1]["content"])


def _format_right_share(rows: list[dict[str, Any]]) -> str:
    right, wrong, tied = _count_labels(rows)
    if not right + wrong:
        return f"none ({tied} tied)"
    return f"{format_interval(wilson_interval(right, right + wrong), '.0%')} ({tied} tied)"


def _build_examples_table(rows: list[dict[str, Any]], *, known: bool) -> Table:
    """The pairs with the largest gaps, and those with the smallest that are not identical."""
    different = [row for row in rows if row["tokens"][0] != row["tokens"][1]]
    largest = different[EXAMPLES:][-EXAMPLES:]
    body = []
    for row in [*reversed(largest), *different[:EXAMPLES]]:
        true = [f" (r* {format_number(value, '+.1f')})" for value in _true_rewards(row)] if known else ["", ""]
        scores = [format_number(score, "+.2f") + text for score, text in zip(row["scores"], true, strict=True)]
        texts = [text for pair in zip(row["completions"], scores, strict=True) for text in pair]
        body.append([f"{row['gap']:.2f}", _get_last_message(row), *texts])
    return Table(["gap", "prompt", "chosen", "its score", "rejected", "its score"], body)


def _write_opening(selections: list[StageFolder], gaps: list[float], parts: list[dict[str, Any]] | None) -> str:
    """The sizes, thresholds and correct labels (where `parts` are known) of the selections, as ranges over seeds."""
    summaries = [stage.summary for stage in selections]
    where = f"({selections[0].label})" if len(selections) == 1 else f"at each of {len(selections)} seeds"
    easy = [summary["easy"] / summary["pairs"] for summary in summaries]
    text = (
        f"Of {_format_range([summary['pairs'] for summary in summaries], ',')} pairs sampled from SFT {where}, "
        f"{_format_range([summary['easy'] for summary in summaries], ',')} ({_format_range(easy, '.0%')}) have a gap "
        f"above {_format_range([summary['threshold'] for summary in summaries], '.3g')} and are easy; the median gap "
        f"is {_format_range(gaps, '.2f')}"
    )
    if parts is None:
        return f"{text}."
    texts = []
    for part in ("easy", "hard"):
        counts = [_count_labels(rows[part]) for rows in parts]
        shares = [right / (right + wrong) for right, wrong, _ in counts if right + wrong]
        texts.append(f"{_format_range(shares, '.0%')} of the {part} labels" if shares else f"no {part} labels")
    return f"{text}. The true r* confirms {texts[0]} and {texts[1]}, without ties."


def _format_range(values: Sequence[float], form: str) -> str:
    """`5`, or `4 to 6` where they are not all the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
