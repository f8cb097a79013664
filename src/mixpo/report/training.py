"""How did training go? Curves of every DPO and PPO of the first seed, and their alarms."""

from mixpo.experiments.results import Results, StageFolder, list_first, read_stage_metrics
from mixpo.report import figures
from mixpo.report.comparison import counted
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
"""By kind of stage: what is plotted, by its key in metrics.jsonl."""


def section(results: Results) -> Section | None:
    """A figure a metric, with a line a stage of the same colour in all."""
    plain = [stage for stage in results.stages if stage.kind in PLOTS and stage.plain]
    seed = next((seed for seed in results.seeds if any(seed in stage.seeds for stage in plain)), None)
    stages = [stage for stage in plain if seed in stage.seeds]
    if seed is None:
        return None
    groups = []
    for kind, plots in PLOTS.items():
        own = {stage.arms[0]: read_stage_metrics(stage.folder) for stage in stages if stage.kind == kind}
        if own:
            pictures = [picture for key, title in plots.items() if (picture := _picture(own, kind, key, title))]
            groups.append(
                Group(kind, pictures, _table(results, kind), key=figures.key(list(own)) if len(own) > 1 else None)
            )
    notes = [
        "DPO's loss counts only the difference of chosen and rejected, so both log-probs may fall. A stage that many "
        f"arms share bears the name of the first. Lines of more than {figures.MAX_POINTS} steps are averaged in groups."
    ]
    alarms = [
        f"Alarm, {stage.kind} of {list_first(stage.arms)} ({stage.label}): {alarm}."
        for stage in results.stages
        if stage.kind in PLOTS
        for alarm in stage.summary.get("alarms", ())
    ]
    return Section(
        "training", "Training", _opening(results, stages, seed, len(alarms)), [Group(notes=[*alarms, *notes]), *groups]
    )


def _picture(own: dict[str, list[dict[str, float]]], kind: str, key: str, title: str) -> Figure | None:
    series = {
        arm: [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
        for arm, rows in own.items()
    }
    series = {arm: points for arm, points in series.items() if points}
    name = f"{kind.lower()}-{key.replace('_', '-')}"
    return figures.lines(series, name=name, title=title, shared=list(own)) if series else None


def _table(results: Results, kind: str) -> Table:
    """The last tenth of the steps of every stage, averaged over seeds."""
    keys = {
        "DPO": ("pairs", "steps", "loss", "accuracy", "margin"),
        "PPO": ("prompts", "steps", "score", "kl", "kl_from_sft", "entropy", "end_rate"),
    }
    found: dict[str, list[dict[str, float]]] = {}
    for stage in results.stages_of(kind):
        found.setdefault(stage.arms[0], []).append(stage.summary)
    rows = []
    for arm, summaries in found.items():
        cells = []
        for key in keys[kind]:
            values = [one[key] for one in summaries if one.get(key) is not None]
            cells.append(f"{sum(values) / len(values):.4g}" if values else "")
        rows.append([arm, f"{len(summaries)}", *cells])
    note = "Averaged over the last tenth of the steps, and over the seeds at which the stage finished."
    return Table(["stage of", "seeds", *keys[kind]], rows, [note])


def _opening(results: Results, stages: list[StageFolder], seed: int, alarms: int) -> str:
    kinds = {kind: sum(stage.kind == kind for stage in stages) for kind in PLOTS}
    drawn = " and ".join(counted(count, f"{kind} stage") for kind, count in kinds.items() if count)
    which = f" of seed {seed}" if len(results.seeds) > 1 else ""
    said = f"finished stages raised {counted(alarms, 'alarm') if alarms else 'no alarm'}, all seeds and sweeps together"
    return f"The curves of {drawn}{which}; {said}."
