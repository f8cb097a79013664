"""How did training go? Curves of every DPO and PPO of the first seed, and their alarms."""

from collections.abc import Iterator

from mixpo.report import figures
from mixpo.report.document import Figure, Group, Section
from mixpo.report.results import Results, StageFolder, metrics

PLOTS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "DPO": (
        ("loss", {"loss": "loss"}),
        ("accuracy on its pairs", {"accuracy": "accuracy"}),
        ("log-prob of a completion", {"chosen": "chosen_logprob", "rejected": "rejected_logprob"}),
        ("implicit reward", {"chosen": "chosen_reward", "rejected": "rejected_reward"}),
    ),
    "PPO": (
        ("score", {"score": "score"}),
        ("KL from its reference", {"kl": "kl"}),
        ("KL from SFT", {"kl_from_sft": "kl_from_sft"}),
        ("kl_coef", {"kl_coef": "kl_coef"}),
        ("entropy", {"entropy": "entropy"}),
        ("end rate", {"end_rate": "end_rate"}),
        ("completion tokens", {"completion_tokens": "completion_tokens"}),
        ("value: explained variance", {"value_explained_variance": "value_explained_variance"}),
    ),
}
"""By kind of stage: a plot's title, and its lines' names with their keys in metrics.jsonl."""


def section(results: Results) -> Section | None:
    """A group a stage."""
    stages = [stage for stage in results.stages if stage.kind in PLOTS and results.seeds[0] in stage.seeds]
    if not stages:
        return None
    groups = []
    for stage in stages:
        size = " · ".join(
            f"{stage.summary[key]:,} {key}" for key in ("pairs", "prompts", "steps") if key in stage.summary
        )
        groups.append(
            Group(f"{stage.kind} of {', '.join(stage.arms)}", list(_plots(stage)), notes=[f"{stage.key} · {size}"])
        )
    notes = [
        "DPO's loss counts only the difference of chosen and rejected, so both log-probs may fall. "
        f"Lines of more than {figures.MAX_POINTS} steps are averaged in groups."
    ]
    alarmed = [
        f"Alarm, {stage.kind} of {', '.join(stage.arms)}, {stage.label}: {alarm}."
        for stage in results.stages
        for alarm in (stage.summary.get("alarms", ()) if stage.kind in PLOTS else ())
    ]
    return Section(
        "training", "Training", _opening(results, stages, len(alarmed)), [Group(notes=[*alarmed, *notes]), *groups]
    )


def _opening(results: Results, stages: list[StageFolder], alarms: int) -> str:
    kinds = {kind: sum(stage.kind == kind for stage in stages) for kind in PLOTS}
    counted = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    seed = f" of seed {results.seeds[0]}" if len(results.seeds) > 1 else ""
    said = "no stage raised an alarm" if not alarms else f"{alarms} alarms were raised at all seeds together"
    return f"The curves of {counted} stages{seed}; {said}."


def _plots(stage: StageFolder) -> Iterator[Figure]:
    rows = metrics(stage.folder)
    for title, keys in PLOTS[stage.kind]:
        series = {
            name: [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
            for name, key in keys.items()
        }
        if all(series.values()):
            slug = "-".join(title.lower().replace(":", "").replace("_", "-").split())
            yield figures.lines(series, name=f"{stage.key.lower()}-{slug}", title=title)
