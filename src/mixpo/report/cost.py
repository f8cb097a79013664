"""At what cost? Tokens, model FLOPs, seconds and memory by arm and by stage, and what a unit of them buys."""

from collections.abc import Mapping

import numpy as np

from mixpo.algorithms.statistics import Interval, percentile_interval, resampled_means
from mixpo.experiments.run import ArmResult
from mixpo.report import figures
from mixpo.report.comparison import mean_of
from mixpo.report.document import Figure, Group, Section, Table
from mixpo.report.results import Results, StageFolder
from mixpo.report.traces import traced

COUNTED = ("seconds", "tokens_sampled", "tokens_trained", "flops")
HEADINGS = ("seconds", "tokens sampled", "tokens trained", "FLOPs", "peak memory (MiB)")


def section(results: Results) -> Section | None:
    """Cost by arm, reward by cost, samples that MPO and PPO need, cost by stage."""
    stages = {stage.key: stage for stage in results.stages}
    if not stages:
        return None
    spent = {arm.name: _mean_cost(results, arm.name, stages) for arm in results.arms if results.done(arm.name)}
    groups = [Group("By arm", _pictures(results, spent), _arm_table(results, spent))]
    needed = _samples_needed(results)
    if needed:
        groups.append(needed[1])
    groups.append(Group("By stage", table=_stage_table(results)))
    groups.append(
        Group(
            notes=[
                "An arm's cost is the sum over the stages that it stands on, averaged over seeds: shared stages count "
                "for each arm, its evaluation does not, nor the reward model where only the evaluation reads it. "
                "Tokens and FLOPs are counted (2 a weight and token forward, 6 forward and backward); seconds and "
                "memory are this machine's."
            ]
        )
    )
    return Section("cost", "Cost", _opening(results, list(stages.values()), spent, needed), groups)


def stands_on(arm: ArmResult) -> list[str]:
    """The stages that an arm's model needs: not its evaluation, nor a reward model that only the evaluation reads."""
    kinds = {key.partition("-")[0] for key in arm.stages}
    spare = {"Evaluation"} if kinds & {"Samples", "PPO"} else {"Evaluation", "RewardModel"}
    return [key for key in arm.stages if key.partition("-")[0] not in spare]


def _mean_cost(results: Results, name: str, stages: Mapping[str, StageFolder]) -> dict[str, float]:
    totals = []
    for arm in results.done(name).values():
        own = [stages[key].summary["cost"] for key in stands_on(arm) if key in stages]
        total = {key: sum(float(cost[key]) for cost in own) for key in COUNTED}
        totals.append({**total, "peak_memory_mib": max((float(cost["peak_memory_mib"]) for cost in own), default=0.0)})
    return {key: float(np.mean([total[key] for total in totals])) for key in totals[0]}


def _arm_table(results: Results, spent: Mapping[str, Mapping[str, float]]) -> Table:
    base = spent.get("sft")
    rows = []
    for name, cost in spent.items():
        cells = _cells(cost)
        if base is not None:
            gain = float(results.values(name, "score").mean() - results.values("sft", "score").mean())
            more = {key: cost[key] - base[key] for key in ("flops", "seconds")}
            cells.append(f"{gain / more['flops'] * 1e15:.2f}" if more["flops"] > 0 else "")
            cells.append(f"{gain / more['seconds'] * 60:.2f}" if more["seconds"] > 0 else "")
        rows.append([name, *cells])
    for name in results.names:
        if name not in spent:
            rows.append([name, "failed", *[""] * (len(rows[0]) - 2 if rows else 0)])
    per = ["gain in reward over SFT per 1e15 FLOPs", "per minute"] if base is not None else []
    notes = ["What an arm gains over SFT is divided by what it costs more than SFT."] if base is not None else []
    return Table(["arm", *HEADINGS, *per], rows, notes)


def _pictures(results: Results, spent: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    points = []
    for name in results.plain:
        flops = spent[name]["flops"] / 1e12
        points.append(figures.Point(name, Interval(flops, flops, flops), mean_of(results, name, "score")))
    return [figures.plane(points, name="reward-by-flops", x="model FLOPs (1e12), all stages of the arm", y="reward")]


def _samples_needed(results: Results) -> tuple[str, Group] | None:
    """How many completions MPO's PPO samples until it reaches the reward with which PPO ends (v2's claim)."""
    traces = {trace.arm: trace for trace in traced(results)}
    if not {"mpo", "ppo"} <= traces.keys() or traces["mpo"].seeds != traces["ppo"].seeds:
        return None
    mpo, ppo = traces["mpo"], traces["ppo"]
    values = np.stack(
        [mpo.values("score", point) for point in range(mpo.points)] + [ppo.values("score", ppo.points - 1)]
    )
    drawn = resampled_means(values)
    reached = np.array([first_reached(mpo.sampled, column[:-1], column[-1]) for column in drawn.T])
    mean = first_reached(mpo.sampled, values.mean(axis=(1, 2))[:-1], float(values[-1].mean()))
    share = float(np.isfinite(reached).mean())
    pairs = sum(2 * stage.summary["pairs"] for stage in results.stages_of("Samples") if stage.seeds[0] == mpo.seeds[0])
    text = f"PPO samples {ppo.sampled[-1]:,.0f} completions"
    if np.isfinite(mean) and share >= 0.95:
        interval = percentile_interval(mean, reached[np.isfinite(reached)])
        text += (
            f"; mpo's PPO comes to the reward with which it ends after {mean:,.0f} [{interval.low:,.0f}, "
            f"{interval.high:,.0f}], besides {pairs:,} sampled for its pairs"
        )
    elif np.isfinite(mean):
        text += (
            f"; mpo's PPO comes to the reward with which it ends after {mean:,.0f}, besides {pairs:,} sampled for its "
            f"pairs, but in {1 - share:.0%} of the resamples it does not come to it at all"
        )
    else:
        text += f"; mpo's PPO does not come to the reward with which it ends in its {mpo.sampled[-1]:,.0f}"
    paths = {
        trace.arm: [
            figures.Point("", Interval(float(x), float(x), float(x)), trace.mean("score", point))
            for point, x in enumerate(trace.sampled)
        ]
        for trace in (ppo, mpo)
    }
    picture = figures.paths(paths, name="reward-by-samples", x="completions sampled by PPO", y="reward")
    note = "Rewards on test prompts at the start, at the snapshots and at the end; straight lines between."
    return text, Group("Samples", [picture], notes=[f"{text}.", note])


def first_reached(x: np.ndarray, y: np.ndarray, target: float) -> float:
    """Where the line through the points first comes to `target`; nan if it never does."""
    if y[0] >= target:
        return float(x[0])
    for place in range(1, len(y)):
        if y[place] >= target:
            share = (target - y[place - 1]) / (y[place] - y[place - 1])
            return float(x[place - 1] + share * (x[place] - x[place - 1]))
    return float("nan")


def _stage_table(results: Results) -> Table:
    first = [stage for stage in results.stages if results.seeds[0] in stage.seeds]
    rows = [[stage.key, ", ".join(stage.arms), *_cells(stage.summary["cost"])] for stage in first]
    notes = [f"Seed {results.seeds[0]}; the others' are alike."] if len(results.seeds) > 1 else []
    return Table(["stage", "arms", *HEADINGS], rows, notes)


def _cells(cost: Mapping[str, float]) -> list[str]:
    counted = [f"{cost[name]:,.0f}" for name in COUNTED[1:3]]
    return [f"{cost['seconds']:,.1f}", *counted, f"{cost['flops']:.2e}", f"{cost['peak_memory_mib']:,.0f}"]


def _opening(
    results: Results,
    stages: list[StageFolder],
    spent: Mapping[str, Mapping[str, float]],
    needed: tuple[str, Group] | None,
) -> str:
    total = sum(stage.summary["cost"]["seconds"] for stage in stages)
    said = f"The {len(stages)} stages took {time_text(total)}"
    if {"mpo", "ppo"} <= spent.keys():
        mpo, ppo = spent["mpo"], spent["ppo"]
        said += (
            f"; mpo, with all that it stands on, takes {mpo['flops'] / ppo['flops']:.2f} times the FLOPs of ppo and "
            f"{mpo['seconds'] / ppo['seconds']:.2f} times its time, and samples {mpo['tokens_sampled']:,.0f} tokens "
            f"to its {ppo['tokens_sampled']:,.0f}"
        )
    return f"{said}. {needed[0]}." if needed else f"{said}."


def time_text(seconds: float) -> str:
    """`95 s`, `12 min`, `2.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
