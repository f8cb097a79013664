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
from mixpo.report.figures.data import interval_cells

Format = Literal["html", "md", "csv", "json"]
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    arms.build_arms_section,
    reward_model.build_reward_model_section,
    selection.build_selection_section,
    distance.build_distance_section,
    overoptimisation.build_overoptimisation_section,
    judges.build_judges_section,
    people.build_people_section,
    cost.build_cost_section,
    subsets.build_subsets_section,
    noise.build_noise_section,
    theorem.build_theorem_section,
    training.build_training_section,
)


def build_document(results: Results) -> Document:
    """The report as data."""
    prompts = completions.list_completions(results)
    seeds = ("seeds" if len(results.seeds) > 1 else "seed", ", ".join(map(str, results.seeds)))
    facts = [("arms", ", ".join(results.arm_names)), seeds]
    facts += [("data", _describe_data(stage.summary)) for stage in results.list_stages_of_kind("Data")]
    facts += dict.fromkeys(
        (f"{stage.kind} rows", text)
        for kind in ("SFT", "RewardModel", "DPO")
        for stage in results.list_stages_of_kind(kind)
        if (text := _describe_excluded(stage.summary))
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
        completions_opening=completions.write_opening(results, prompts),
        prompts=prompts,
        pair=arms.choose_compared_arms(results),
        failures=[*reasons, *theorem.list_failures(results)],
        recipes=[(run.name, yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)) for run in results.runs],
    )


def _describe_data(summary: dict[str, Any]) -> str:
    text = f"{summary['train_rows']:,} train pairs, {summary['test_rows']:,} test pairs, "
    text += f"{summary['demonstration_rows']:,} demonstrations"
    text += f", {summary['second_rows']:,} pairs for the second reward model" if summary.get("second_rows") else ""
    return text + (f"; {summary['bad_rows']:,} bad rows were excluded" if summary["bad_rows"] else "")


def _describe_excluded(summary: dict[str, Any]) -> str:
    """The numbers of truncated and of excluded rows of a stage; empty if there are none."""
    keys = {
        "completions truncated to max_completion_tokens": "truncated",
        "pairs of identical completions excluded": "identical",
    }
    return ", ".join(f"{summary[key]:,} {words}" for words, key in keys.items() if summary.get(key))


def render_report(results: Results, form: Format) -> str:
    """The report as text in one of the formats."""
    if form == "csv":
        columns, rows = tabulate_means(results)
        return render.format_csv(columns, rows)
    if form == "json":
        return render_json(results)
    if form == "md":
        return render.render_markdown(build_document(results))
    newest = max((run.folder / "results.json").stat().st_mtime for run in results.runs)
    return render.render_html(
        build_document(results),
        mixpo=", ".join(dict.fromkeys(run.mixpo for run in results.runs)),
        date=f"{datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}",
    )


def write_page(results: Results, folder: Path) -> Path:
    """Write `report.html` into a folder and return its path."""
    path = folder / "report.html"
    path.write_text(render_report(results, "html"), encoding="utf8")
    return path


def tabulate_means(results: Results) -> tuple[list[str], list[list[Any]]]:
    """The means as columns of numbers: a row for every arm and seed, and one for every arm over all seeds."""
    keys = [*MEASURES, "kl_from_sft", "tokens", "ended"]
    columns = ["arm", "seed", "status", "prompts", *(f"{key}{end}" for key in keys for end in ("", "_low", "_high"))]
    rows: list[list[Any]] = []
    for name in results.arm_names:
        done, ran = results.get_finished_by_seed(name), results.list_arm_results(name)
        for arm in ran:
            if arm.seed in done:
                prompts = results.get_column(name, "score", [arm.seed]).size
                rows.append([name, arm.seed, "done", prompts, *_list_means(results, name, keys, [arm.seed])])
            else:
                rows.append([name, arm.seed, "failed", None, *[None] * (3 * len(keys))])
        if done:
            status = "done" if len(done) == len(ran) else f"done at {len(done)} of {len(ran)} seeds"
            prompts = results.get_column(name, "score").shape[1]
            rows.append([name, "all", status, prompts, *_list_means(results, name, keys, None)])
    return columns, rows


def _list_means(results: Results, name: str, keys: Sequence[str], seeds: list[int] | None) -> list[float | None]:
    """Mean, low and high of columns, None where there is none; without bounds at some seeds alone."""
    cells: list[float | None] = []
    for key in keys:
        if not results.have_column([name], key):
            cells += [None, None, None]
        elif seeds is None:
            cells += interval_cells(estimate_mean(results, name, key))
        else:
            cells += [float(results.get_column(name, key, seeds).mean()), None, None]
    return cells


def render_json(results: Results) -> str:
    """The report as JSON, without SVG and completions."""
    document = build_document(results)
    columns, rows = tabulate_means(results)

    def leave_out_html(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in fields if name not in ("svg", "key")}

    content = {
        "title": document.title,
        "facts": dict(document.facts),
        "arms": [dict(zip(columns, row, strict=True)) for row in rows],
        "sections": [asdict(section, dict_factory=leave_out_html) for section in document.sections],
        "failed": [{"what": what, "why": why} for what, why in document.failures],
        "recipes": {run.name: run.recipe for run in results.runs},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
