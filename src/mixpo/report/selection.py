"""The split of pairs into easy and hard: gaps, threshold, sizes, correct labels, and examples."""

from collections.abc import Sequence
from typing import Any

from mixpo.algorithms.intervals import wilson_interval
from mixpo.data.rows import convert_to_messages
from mixpo.data.world import true_reward
from mixpo.experiments.results import Results, StageResult, select_unswept_stage_per_seed
from mixpo.report import figures
from mixpo.report.comparison import format_interval, format_number
from mixpo.report.document import Section, SectionGroup, Table
from mixpo.stages.rows import read_table

EXAMPLES = 3
"""Example pairs with the largest, and with the smallest gaps."""


def build_selection_section(results: Results) -> Section | None:
    """The section with every split into easy and hard pairs, a histogram of gaps, and examples; None without one."""
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
    true_reward_known = all(stage.run.uses_embedded_world for stage in stages)
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
        if true_reward_known:
            row |= {f"correct {part} labels": _format_correct_share(pairs) for part, pairs in parts[stage.key].items()}
        rows.append(row)
    shown = select_unswept_stage_per_seed(stages)
    histogram = figures.plot_histogram(
        {part: [float(row["gap"]) for stage in shown for row in parts[stage.key][part]] for part in ("hard", "easy")},
        thresholds=[stage.summary["threshold"] for stage in shown],
        name="gaps",
        xlabel="gap between the two scores",
    )
    first = shown[0]
    rows_of_first = sorted(parts[first.key]["easy"] + parts[first.key]["hard"], key=lambda row: float(row["gap"]))
    which = first.label if len(shown) == 1 else f"{len(shown)} seeds together"
    notes = ["Identical: pairs of the same completion twice, with gap 0."]
    if true_reward_known:
        notes.append(
            "Correct: the chosen completion has the higher true r*. Pairs with a tie in r* are counted separately. "
            "Brackets: Wilson 95% intervals."
        )
    examples = _build_examples_table(rows_of_first, true_reward_known=true_reward_known)
    groups = [
        SectionGroup(table=Table.from_row_dicts(rows, notes)),
        SectionGroup(f"Gaps ({which})", [histogram]),
        SectionGroup(f"Pairs with the largest and the smallest gaps ({first.label})", table=examples),
    ]
    gaps = [samples[stage.key]["gap_median"] for stage in shown]
    opening = _summarize_selections(shown, gaps, [parts[stage.key] for stage in shown] if true_reward_known else None)
    return Section("selection", "Selection", opening, groups)


def _count_correct_labels(pairs: list[dict[str, Any]]) -> tuple[int, int, int]:
    """(right, wrong, tied): numbers of pairs whose label the true reward confirms, contradicts, cannot tell."""
    right = wrong = 0
    for pair in pairs:
        chosen, rejected = _compute_true_rewards(pair)
        right, wrong = right + (chosen > rejected), wrong + (chosen < rejected)
    return right, wrong, len(pairs) - right - wrong


def _compute_true_rewards(pair: dict[str, Any]) -> list[float]:
    return [true_reward(_get_last_prompt_message(pair), text) for text in pair["completions"]]


def _get_last_prompt_message(pair: dict[str, Any]) -> str:
    return str(convert_to_messages(pair["prompt"])[-1]["content"])


def _format_correct_share(pairs: list[dict[str, Any]]) -> str:
    """`90% [80%, 95%] (2 tied)`: share of labels that the true reward confirms, without ties."""
    right, wrong, tied = _count_correct_labels(pairs)
    if not right + wrong:
        return f"none ({tied} tied)"
    return f"{format_interval(wilson_interval(right, right + wrong), '.0%')} ({tied} tied)"


def _build_examples_table(pairs_by_gap: list[dict[str, Any]], *, true_reward_known: bool) -> Table:
    """A row for each of the 3 pairs with the largest gaps and the 3 with the smallest, from pairs sorted by gap."""
    different = [pair for pair in pairs_by_gap if pair["tokens"][0] != pair["tokens"][1]]
    largest = different[EXAMPLES:][-EXAMPLES:]
    body = []
    for pair in [*reversed(largest), *different[:EXAMPLES]]:
        rewards = _compute_true_rewards(pair) if true_reward_known else []
        true = [f" (r* {format_number(value, '+.1f')})" for value in rewards] or ["", ""]
        scores = [format_number(score, "+.2f") + text for score, text in zip(pair["scores"], true, strict=True)]
        texts = [text for cells in zip(pair["completions"], scores, strict=True) for text in cells]
        body.append([f"{pair['gap']:.2f}", _get_last_prompt_message(pair), *texts])
    return Table(["gap", "prompt", "chosen", "its score", "rejected", "its score"], body)


def _summarize_selections(
    selections: list[StageResult], median_gaps: list[float], pairs_by_part: list[dict[str, Any]] | None
) -> str:
    """Sentences on the sizes, thresholds and correct labels (if `pairs_by_part` is given), as ranges over seeds."""
    summaries = [stage.summary for stage in selections]
    where = f"({selections[0].label})" if len(selections) == 1 else f"at each of {len(selections)} seeds"
    easy = [summary["easy"] / summary["pairs"] for summary in summaries]
    text = (
        f"Of {_format_range([summary['pairs'] for summary in summaries], ',')} pairs sampled from SFT {where}, "
        f"{_format_range([summary['easy'] for summary in summaries], ',')} ({_format_range(easy, '.0%')}) have a gap "
        f"above {_format_range([summary['threshold'] for summary in summaries], '.3g')} and are easy; the median gap "
        f"is {_format_range(median_gaps, '.2f')}"
    )
    if pairs_by_part is None:
        return f"{text}."
    texts = []
    for part in ("easy", "hard"):
        counts = [_count_correct_labels(rows[part]) for rows in pairs_by_part]
        shares = [right / (right + wrong) for right, wrong, _ in counts if right + wrong]
        texts.append(f"{_format_range(shares, '.0%')} of the {part} labels" if shares else f"no {part} labels")
    return f"{text}. The true r* confirms {texts[0]} and {texts[1]}, without ties."


def _format_range(values: Sequence[float], format_spec: str) -> str:
    """`4 to 6` of the smallest and largest value, or `5` where they print the same."""
    low, high = format(min(values), format_spec), format(max(values), format_spec)
    return low if low == high else f"{low} to {high}"
