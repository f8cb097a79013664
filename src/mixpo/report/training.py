"""Training curves of every DPO and PPO stage of the first seed, and the alarms of all."""

from collections.abc import Iterable

from mixpo.experiments.results import Results, StageResult, format_first_names, read_stage_metrics
from mixpo.report import figures
from mixpo.report.comparison import format_count, format_number
from mixpo.report.document import Figure, Section, SectionGroup, Table

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
    """The section with figures of DPO's and PPO's metrics at the first seed, and all alarms; None without a stage."""
    plain = [stage for stage in results.stages if stage.kind in PLOTS and stage.plain]
    seed = next((seed for seed in results.seeds if any(seed in stage.seeds for stage in plain)), None)
    stages = [stage for stage in plain if seed in stage.seeds]
    alarms = [
        f"Alarm, {stage.kind} of {format_first_names(stage.arms)} ({stage.label}): {alarm}."
        for stage in results.stages
        if stage.kind in ("SFT", *PLOTS)
        for alarm in stage.summary.get("alarms", ())
    ]
    if seed is None and not alarms:
        return None
    groups = []
    for kind in PLOTS:
        metrics = {stage.arms[0]: read_stage_metrics(stage.folder) for stage in stages if stage.kind == kind}
        if metrics:
            curves, constants = _plot_metrics(metrics, kind, _group_arms_by_reward_model(results, metrics, seed))
            colours = figures.make_colour_key(list(metrics)) if len(metrics) > 1 and curves else None
            groups.append(SectionGroup(kind, curves, _build_final_metrics_table(results, kind), constants, colours))
    notes = [
        "DPO's loss depends only on the difference between chosen and rejected, so both log-probs may fall. A stage "
        "that several arms share is named after the first. "
        f"Curves of more than {figures.MAX_POINTS} steps are averaged in groups."
    ]
    opening = _summarize_training(results, stages, seed, len(alarms))
    return Section("training", "Training", opening, [SectionGroup(notes=[*alarms, *notes]), *groups])


def _group_arms_by_reward_model(results: Results, arms: Iterable[str], seed: int | None) -> dict[str, list[str]]:
    """Arms whose scores are on one scale, by the run of the first."""
    by_model: dict[str, tuple[str, list[str]]] = {}
    for arm in arms:
        run = results.find_run_of_arm(arm)
        models = [one.reward_models["reward"] for one in run.arms if one.seed == seed and "reward" in one.reward_models]
        by_model.setdefault(models[0] if models else run.name, (run.name, []))[1].append(arm)
    return dict(by_model.values())


def _plot_metrics(
    rows_by_arm: dict[str, list[dict[str, float]]], stage_kind: str, arms_by_scale: dict[str, list[str]]
) -> tuple[list[Figure], list[str]]:
    """Figures of the metrics that change during training, a curve an arm, and at most one note on those that do not."""
    curves, constants = [], []
    for key, title in PLOTS[stage_kind].items():
        series = {
            arm: [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
            for arm, rows in rows_by_arm.items()
        }
        series = {arm: points for arm, points in series.items() if points}
        scales = arms_by_scale if key == "score" else {"": list(series)}
        if any(len({value for _, value in points}) > 1 for points in series.values()):
            for number, (run, arms) in enumerate(scales.items(), start=1):
                name = f"{stage_kind.lower()}-{key.replace('_', '-')}" + (f"-{number}" if len(scales) > 1 else "")
                of_run = f"{title} (reward model of {run})" if len(scales) > 1 else title
                chosen = {arm: points for arm, points in series.items() if arm in arms}
                curves.append(figures.plot_curves(chosen, name=name, title=of_run, key_names=list(rows_by_arm)))
        elif series:
            values = dict.fromkeys(format_number(points[0][1], ".4g") for points in series.values())
            constants.append(f"{title} {', '.join(values)}")
    return curves, [f"Not plotted, because constant: {'; '.join(constants)}."] if constants else []


def _build_final_metrics_table(results: Results, stage_kind: str) -> Table:
    """A row for every stage: its metrics, averaged over the last tenth of the steps and over seeds."""
    keys = {
        "DPO": ("pairs", "steps", "loss", "accuracy", "margin"),
        "PPO": ("prompts", "steps", "score", "kl", "kl_from_sft", "entropy", "end_rate"),
    }
    summaries: dict[str, list[dict[str, float]]] = {}
    for stage in results.list_stages_of_kind(stage_kind):
        summaries.setdefault(stage.arms[0], []).append(stage.summary)
    rows = []
    for arm, by_seed in summaries.items():
        cells = []
        for key in keys[stage_kind]:
            values = [summary[key] for summary in by_seed if summary.get(key) is not None]
            cells.append(format_number(sum(values) / len(values), ".4g") if values else "")
        rows.append([arm, f"{len(by_seed)}", *cells])
    note = "Means over the last tenth of the steps and over the finished seeds."
    return Table(["stage of", "seeds", *keys[stage_kind]], rows, [note])


def _summarize_training(results: Results, plotted_stages: list[StageResult], seed: int | None, alarm_count: int) -> str:
    """A sentence with the number of alarms and the numbers of stages whose curves are plotted."""
    kinds = {kind: sum(stage.kind == kind for stage in plotted_stages) for kind in PLOTS}
    shown = " and ".join(format_count(count, f"{kind} stage") for kind, count in kinds.items() if count)
    which = f" of seed {seed}" if len(results.seeds) > 1 else ""
    raised = format_count(alarm_count, "alarm") if alarm_count else "no alarm"
    curves = f"; the curves are of {shown}{which}" if shown else ""
    return f"The stages of all seeds and sweeps raised {raised}{curves}."
