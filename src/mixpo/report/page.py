"""The report of finished runs: all sections together, written as HTML, Markdown, CSV or JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from mixpo.experiments.results import MEASURES, Results
from mixpo.report import (
    arms,
    completions,
    cost,
    distance,
    judges,
    noise,
    overoptimisation,
    people,
    render,
    reward_model,
    selection,
    subsets,
    theorem,
    training,
)
from mixpo.report.comparison import estimate_mean
from mixpo.report.document import Document, Section
from mixpo.report.figures.data import split_interval

Format = Literal["html", "md", "csv", "json"]
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    arms.build_results_section,
    reward_model.build_reward_model_section,
    selection.build_selection_section,
    distance.build_distance_section,
    overoptimisation.build_overoptimisation_section,
    judges.build_judges_section,
    people.build_human_study_section,
    cost.build_cost_section,
    subsets.build_subsets_section,
    noise.build_label_noise_section,
    theorem.build_theorem_section,
    training.build_training_section,
)


def build_document(results: Results) -> Document:
    """The whole report as data, from which HTML, Markdown and JSON are rendered."""
    prompts = completions.collect_prompt_completions(results)
    seeds = ("seeds" if len(results.seeds) > 1 else "seed", ", ".join(map(str, results.seeds)))
    facts = [("arms", ", ".join(results.arm_names)), seeds]
    facts += [("data", _describe_data_sizes(stage.summary)) for stage in results.list_stages_of_kind("Data")]
    facts += dict.fromkeys(
        (f"{stage.kind} rows", text)
        for kind in ("SFT", "RewardModel", "DPO")
        for stage in results.list_stages_of_kind(kind)
        if (text := _describe_truncated_and_excluded(stage.summary))
    )
    facts += [("models", f"{run.folder / 'models'}/ARM-SEED") for run in results.runs]
    reasons = [
        (f"{arm.name} (seed {arm.seed})", arm.reason or "unknown reason")
        for status in ("failed", "done")
        for arm in results.arms
        if arm.status == status and (arm.reason or status == "failed")
    ]
    return Document(
        title=results.run_names,
        facts=facts,
        sections=[section for build in SECTIONS if (section := build(results)) is not None],
        completions_opening=completions.describe_shown_completions(results, prompts),
        prompts=prompts,
        pair=arms.choose_headline_arms(results),
        failures=[*reasons, *theorem.list_failed_gradients(results)],
        recipes=[(run.name, yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)) for run in results.runs],
    )


def _describe_data_sizes(summary: dict[str, Any]) -> str:
    """Numbers of train, test, demonstration and bad rows of a data stage, as text."""
    text = f"{summary['train_rows']:,} train pairs, {summary['test_rows']:,} test pairs, "
    text += f"{summary['demonstration_rows']:,} demonstrations"
    text += f", {summary['second_rows']:,} pairs for the second reward model" if summary.get("second_rows") else ""
    return text + (f"; {summary['bad_rows']:,} bad rows were excluded" if summary["bad_rows"] else "")


def _describe_truncated_and_excluded(summary: dict[str, Any]) -> str:
    """Numbers of completions truncated and of pairs excluded by a stage, as text; empty if there are none."""
    keys = {
        "completions truncated to max_completion_tokens": "truncated",
        "pairs of identical completions excluded": "identical",
    }
    return ", ".join(f"{summary[key]:,} {words}" for words, key in keys.items() if summary.get(key))


def render_report(results: Results, output_format: Format) -> str:
    """The report as one string of HTML, Markdown, JSON, or CSV (the means alone)."""
    if output_format == "csv":
        columns, rows = tabulate_means(results)
        return render.format_csv(columns, rows)
    if output_format == "json":
        return render_json(results)
    if output_format == "md":
        return render.render_markdown(build_document(results))
    newest = max((run.folder / "results.json").stat().st_mtime for run in results.runs)
    return render.render_html(
        build_document(results),
        mixpo_version=", ".join(dict.fromkeys(run.mixpo for run in results.runs)),
        date=f"{datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}",
    )


def write_html_report(results: Results, folder: Path) -> Path:
    """Write the report to `report.html` in a folder and return its path."""
    path = folder / "report.html"
    path.write_text(render_report(results, "html"), encoding="utf8")
    return path


def tabulate_means(results: Results) -> tuple[list[str], list[list[Any]]]:
    """Column names, and rows of means and bounds, of an arm at a seed or at all seeds; None for what is missing."""
    keys = [*MEASURES, "kl_from_sft", "tokens", "ended"]
    columns = ["arm", "seed", "status", "prompts", *(f"{key}{end}" for key in keys for end in ("", "_low", "_high"))]
    rows: list[list[Any]] = []
    for name in results.arm_names:
        done, ran = results.get_finished_by_seed(name), results.list_arm_results(name)
        for arm in ran:
            if arm.seed in done:
                prompts = results.get_evaluation_column(name, "score", [arm.seed]).size
                rows.append([name, arm.seed, "done", prompts, *_list_mean_cells(results, name, keys, [arm.seed])])
            else:
                rows.append([name, arm.seed, "failed", None, *[None] * (3 * len(keys))])
        if done:
            status = "done" if len(done) == len(ran) else f"done at {len(done)} of {len(ran)} seeds"
            prompts = results.get_evaluation_column(name, "score").shape[1]
            rows.append([name, "all", status, prompts, *_list_mean_cells(results, name, keys, None)])
    return columns, rows


def _list_mean_cells(results: Results, arm: str, columns: Sequence[str], seeds: list[int] | None) -> list[float | None]:
    """Mean, low and high of each column in one list; None for a missing column, and for bounds if `seeds` is given."""
    cells: list[float | None] = []
    for key in columns:
        if not results.have_column([arm], key):
            cells += [None, None, None]
        elif seeds is None:
            cells += split_interval(estimate_mean(results, arm, key))
        else:
            cells += [float(results.get_evaluation_column(arm, key, seeds).mean()), None, None]
    return cells


def render_json(results: Results) -> str:
    """The report as JSON text, without SVG and completions."""
    document = build_document(results)
    columns, rows = tabulate_means(results)

    def make_dict_without_html(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in fields if name not in ("svg", "key")}

    content = {
        "title": document.title,
        "facts": dict(document.facts),
        "arms": [dict(zip(columns, row, strict=True)) for row in rows],
        "sections": [asdict(section, dict_factory=make_dict_without_html) for section in document.sections],
        "failed": [{"what": what, "why": why} for what, why in document.failures],
        "recipes": {run.name: run.recipe for run in results.runs},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
