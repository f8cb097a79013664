"""Training curves of every DPO and PPO stage of the first seed, and the alarms of all."""

from mixpo.experiments.results import Results, StageResult, format_first_names, read_stage_metrics
from mixpo.report import figures
from mixpo.report.comparison import format_count, format_number
from mixpo.report.document import Figure, Group, Section, Table

PLOTS: dict[str, dict[str, str]] = {
    "DPO": {
        "loss": "loss",
        "accuracy": "accuracy on its pairs",
        "chosen_logprob": "log-prob of chosen",
        "rejected_logprob": "log-prob of rejected",
        "chosen_reward": "implicit reward of chosen",
        "rejected_reward": "implicit reward of rejected",
    },
    "PPO": {
        "score": "score",
        "kl": "KL from its reference",
        "kl_from_sft": "KL from SFT",
        "kl_coef": "kl_coef",
        "entropy": "entropy",
        "end_rate": "end rate",
        "completion_tokens": "completion tokens",
        "value_explained_variance": "value: explained variance",
    },
}
"""Plotted metrics by kind of stage: key in metrics.jsonl and title."""


def build_training_section(results: Results) -> Section | None:
    """The section with a figure for every metric that varies, and a line of one colour for every stage."""
    plain = [stage for stage in results.stages if stage.kind in PLOTS and stage.plain]
    seed = next((seed for seed in results.seeds if any(seed in stage.seeds for stage in plain)), None)
    stages = [stage for stage in plain if seed in stage.seeds]
    if seed is None:
        return None
    groups = []
    for kind in PLOTS:
        metrics = {stage.arms[0]: read_stage_metrics(stage.folder) for stage in stages if stage.kind == kind}
        if metrics:
            curves, constants = _plot_metrics(metrics, kind)
            colours = figures.make_colour_key(list(metrics)) if len(metrics) > 1 and curves else None
            groups.append(Group(kind, curves, _build_table(results, kind), constants, colours))
    notes = [
        "DPO's loss depends only on the difference between chosen and rejected, so both log-probs may fall. A stage "
        "that several arms share is named after the first. "
        f"Curves of more than {figures.MAX_POINTS} steps are averaged in groups."
    ]
    alarms = [
        f"Alarm, {stage.kind} of {format_first_names(stage.arms)} ({stage.label}): {alarm}."
        for stage in results.stages
        if stage.kind in PLOTS
        for alarm in stage.summary.get("alarms", ())
    ]
    opening = _write_opening(results, stages, seed, len(alarms))
    return Section("training", "Training", opening, [Group(notes=[*alarms, *notes]), *groups])


def _plot_metrics(metrics: dict[str, list[dict[str, float]]], kind: str) -> tuple[list[Figure], list[str]]:
    """The curves of every metric that varies, and a note on those that never change, from rows by arm."""
    curves, constants = [], []
    for key, title in PLOTS[kind].items():
        series = {
            arm: [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
            for arm, rows in metrics.items()
        }
        series = {arm: points for arm, points in series.items() if points}
        if any(len({value for _, value in points}) > 1 for points in series.values()):
            name = f"{kind.lower()}-{key.replace('_', '-')}"
            curves.append(figures.plot_curves(series, name=name, title=title, shared=list(metrics)))
        elif series:
            values = dict.fromkeys(format_number(points[0][1], ".4g") for points in series.values())
            constants.append(f"{title} {', '.join(values)}")
    return curves, [f"Not plotted, because constant: {'; '.join(constants)}."] if constants else []


def _build_table(results: Results, kind: str) -> Table:
    """A row for every stage: its metrics, averaged over the last tenth of the steps and over seeds."""
    keys = {
        "DPO": ("pairs", "steps", "loss", "accuracy", "margin"),
        "PPO": ("prompts", "steps", "score", "kl", "kl_from_sft", "entropy", "end_rate"),
    }
    summaries: dict[str, list[dict[str, float]]] = {}
    for stage in results.list_stages_of_kind(kind):
        summaries.setdefault(stage.arms[0], []).append(stage.summary)
    rows = []
    for arm, by_seed in summaries.items():
        cells = []
        for key in keys[kind]:
            values = [summary[key] for summary in by_seed if summary.get(key) is not None]
            cells.append(format_number(sum(values) / len(values), ".4g") if values else "")
        rows.append([arm, f"{len(by_seed)}", *cells])
    note = "Means over the last tenth of the steps and over the finished seeds."
    return Table(["stage of", "seeds", *keys[kind]], rows, [note])


def _write_opening(results: Results, stages: list[StageResult], seed: int, alarms: int) -> str:
    kinds = {kind: sum(stage.kind == kind for stage in stages) for kind in PLOTS}
    shown = " and ".join(format_count(count, f"{kind} stage") for kind, count in kinds.items() if count)
    which = f" of seed {seed}" if len(results.seeds) > 1 else ""
    raised = format_count(alarms, "alarm") if alarms else "no alarm"
    return f"The stages of all seeds and sweeps raised {raised}; the curves are of {shown}{which}."
