"""The report of finished runs: its sections put together, and written as HTML, Markdown, CSV or JSON."""

import json
import math
from collections.abc import Callable
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
from mixpo.report.comparison import mean_of
from mixpo.report.document import Document, Section

Format = Literal["html", "md", "csv", "json"]
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    arms.section,
    reward_model.section,
    selection.section,
    distance.section,
    overoptimisation.section,
    judges.section,
    people.section,
    cost.section,
    subsets.section,
    noise.section,
    theorem.section,
    training.section,
)


def document(results: Results) -> Document:
    """The report as data."""
    asked = completions.asked(results)
    facts = [
        ("arms", ", ".join(results.names)),
        ("seeds" if len(results.seeds) > 1 else "seed", ", ".join(map(str, results.seeds))),
    ]
    facts += [("data", _data_text(stage.summary)) for stage in results.stages_of("Data")]
    facts += dict.fromkeys(
        (f"{stage.kind} rows", said)
        for kind in ("SFT", "RewardModel", "DPO")
        for stage in results.stages_of(kind)
        if (said := _left_out(stage.summary))
    )
    facts += [("models", f"{run.folder / 'models'}/ARM-SEED") for run in results.runs]
    failed = [
        (f"{arm.name} (seed {arm.seed})", arm.reason or "no reason was kept")
        for arm in results.arms
        if arm.status == "failed"
    ]
    partly = [
        (f"{arm.name} (seed {arm.seed})", arm.reason) for arm in results.arms if arm.status == "done" and arm.reason
    ]
    return Document(
        title=results.title,
        facts=facts,
        sections=[section for make in SECTIONS if (section := make(results)) is not None],
        completions_opening=completions.opening(results, asked),
        asked=asked,
        pair=arms.compared(results),
        failed=[*failed, *partly, *theorem.failed(results)],
        recipes=[(run.name, yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)) for run in results.runs],
    )


def _data_text(summary: dict[str, Any]) -> str:
    said = f"{summary['train_rows']:,} pairs to train, {summary['test_rows']:,} to test, "
    said += f"{summary['demonstration_rows']:,} demonstrations"
    said += f", {summary['second_rows']:,} for the second reward model" if summary.get("second_rows") else ""
    return said + (f"; {summary['bad_rows']:,} rows were left out" if summary["bad_rows"] else "")


def _left_out(summary: dict[str, Any]) -> str:
    """What a stage could not learn from as it stands in the rows; nothing if there is nothing to say."""
    said = {
        "completions cut to max_completion_tokens": "truncated",
        "pairs of identical completions left out": "identical",
    }
    return ", ".join(f"{summary[key]:,} {words}" for words, key in said.items() if summary.get(key))


def text(results: Results, form: Format) -> str:
    """The report in a form."""
    if form == "csv":
        columns, rows = numbers(results)
        return render.csv_text(columns, rows)
    if form == "json":
        return as_json(results)
    if form == "md":
        return render.markdown(document(results))
    newest = max((run.folder / "results.json").stat().st_mtime for run in results.runs)
    return render.html(
        document(results),
        mixpo=", ".join(dict.fromkeys(run.mixpo for run in results.runs)),
        date=f"{datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}",
    )


def write_page(results: Results, folder: Path) -> Path:
    """Write `report.html` into a folder; its path."""
    path = folder / "report.html"
    path.write_text(text(results, "html"), encoding="utf8")
    return path


def numbers(results: Results) -> tuple[list[str], list[list[Any]]]:
    """The means as plain columns: a row an arm and seed, and a row an arm over all seeds with its intervals."""
    keys = [*MEASURES, "kl_from_sft", "tokens", "ended"]
    columns = [
        "arm",
        "seed",
        "status",
        "prompts",
        *(text for key in keys for text in (key, f"{key}_low", f"{key}_high")),
    ]
    rows: list[list[Any]] = []
    for name in results.names:
        done = results.done(name)
        for arm in results.of(name):
            if arm.seed not in done:
                rows.append([name, arm.seed, "failed", None, *[None] * (3 * len(keys))])
                continue
            means = [
                float(results.values(name, key, [arm.seed]).mean()) if results.has([name], key) else None
                for key in keys
            ]
            prompts = results.values(name, "score", [arm.seed]).size
            rows.append([name, arm.seed, "done", prompts, *(cell for mean in means for cell in (mean, None, None))])
        if done:
            cells: list[float | None] = []
            for key in keys:
                if results.has([name], key):
                    found = mean_of(results, name, key)
                    cells += [found.mean, *(None if math.isnan(bound) else bound for bound in (found.low, found.high))]
                else:
                    cells += [None, None, None]
            status = (
                "done"
                if len(done) == len(results.of(name))
                else f"done at {len(done)} of {len(results.of(name))} seeds"
            )
            rows.append([name, "all", status, results.values(name, "score").shape[1], *cells])
    return columns, rows


def as_json(results: Results) -> str:
    """Everything but the pictures and the completions."""
    made = document(results)
    columns, rows = numbers(results)
    content = {
        "title": made.title,
        "facts": dict(made.facts),
        "arms": [dict(zip(columns, row, strict=True)) for row in rows],
        "sections": [
            {
                "id": section.id,
                "title": section.title,
                "opening": section.opening,
                "groups": [
                    {
                        "title": group.title,
                        "figures": [
                            {
                                "name": figure.name,
                                "columns": list(figure.columns),
                                "rows": [list(row) for row in figure.rows],
                            }
                            for figure in group.figures
                        ],
                        "table": None
                        if group.table is None
                        else {
                            "headings": list(group.table.headings),
                            "rows": [list(row) for row in group.table.rows],
                            "notes": list(group.table.notes),
                        },
                        "notes": list(group.notes),
                    }
                    for group in section.groups
                ],
            }
            for section in made.sections
        ],
        "failed": [{"what": what, "why": why} for what, why in made.failed],
        "recipes": {run.name: run.recipe for run in results.runs},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
