"""Costs by arm and by stage in tokens, model FLOPs, seconds and memory, and the gain in reward per cost."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, compute_crossed_mean_interval
from mixpo.experiments.results import Results, Run, StageFolder, list_first, read_evaluation
from mixpo.experiments.run import ArmResult
from mixpo.report import figures
from mixpo.report.comparison import (
    estimate_mean,
    find_sibling,
    format_arm_label,
    format_interval,
    list_measures,
    note_missing_seeds,
    subtract_values,
)
from mixpo.report.document import Figure, Group, Section, Table
from mixpo.report.traces import load_traces

SUMMED_COSTS = ("seconds", "tokens_sampled", "tokens_trained", "flops")
MEMORY = "peak_memory_mib"
GRID_POINTS = 65
"""Numbers of completions at which MPO's reward is compared with PPO's."""
COST_HEADINGS = ("seconds", "tokens sampled", "tokens trained", "FLOPs", "peak memory (MiB)")


def build_cost_section(results: Results) -> Section | None:
    """The section with cost by arm, reward by cost, completions that MPO and PPO need, and cost by stage."""
    stages = {stage.key: stage for stage in results.stages}
    if not stages:
        return None
    by_seed = {name: _sum_costs(results, name, stages) for name in results.finished}
    costs = {
        name: {key: float(np.mean([cost[key] for cost in seeds.values()])) for key in (*SUMMED_COSTS, MEMORY)}
        for name, seeds in by_seed.items()
    }
    needed = [part for run in results.runs if (part := _compare_samples_needed(results, run)) is not None]
    parallel = any(run.recipe.get("runtime", {}).get("workers", 1) > 1 for run in results.runs)
    note = (
        "An arm's cost is the sum over the stages that it needs, averaged over its finished seeds. Shared stages count "
        "for every arm; evaluations, reward models that only evaluations use, and sampled pairs of which only the "
        f"prompts are used (ppo) do not count. {_describe_best_of_n(results)}FLOPs: 2 per weight and token forward, 6 "
        "forward and backward. Seconds and memory depend on the machine and its "
        f"load{', here other stages of the run (runtime.workers)' if parallel else ''}."
    )
    first = [stage for stage in results.stages if results.seeds[0] in stage.seeds]
    rows = [[stage.key, list_first(stage.arms), *_format_costs(stage.summary["cost"])] for stage in first]
    which = [f"Seed {results.seeds[0]} only."] if len(results.seeds) > 1 else []
    groups = [
        Group("By arm", _plot_all(results, costs), _build_arm_table(results, costs)),
        *(group for _, group in needed),
        Group("By stage", table=Table(["stage", "arms", *COST_HEADINGS], rows, which)),
        Group(notes=[note]),
    ]
    return Section("cost", "Cost", _write_opening(results, by_seed, costs, [text for text, _ in needed]), groups)


def _describe_best_of_n(results: Results) -> str:
    """A sentence on the tokens that best-of-n samples per prompt."""
    best = results.find_first_name("best-of-n")
    if best is None:
        return ""
    summary = read_evaluation(next(iter(results.finished_by_seed(best).values())))
    each = summary["cost"]["tokens_sampled"] / summary["prompts"]
    return f"best-of-n has its cost at every use: {each:,.0f} sampled tokens per prompt. "


def list_needed_stages(arm: ArmResult) -> list[str]:
    """The stages that an arm needs; without `Samples` where only the prompts of the pairs are used."""
    if {"Selection", "DPO"} & {key.partition("-")[0] for key in arm.needs}:
        return arm.needs
    return [key for key in arm.needs if not key.startswith("Samples-")]


def _sum_costs(results: Results, name: str, stages: Mapping[str, StageFolder]) -> dict[int, dict[str, float]]:
    """An arm's costs by seed: sums over its stages, and their peak memory."""
    costs = {}
    for seed, arm in results.finished_by_seed(name).items():
        parts = [stages[key].summary["cost"] for key in list_needed_stages(arm) if key in stages]
        total = {key: sum(float(cost[key]) for cost in parts) for key in SUMMED_COSTS}
        costs[seed] = {**total, MEMORY: max((float(cost[MEMORY]) for cost in parts), default=0.0)}
    return costs


def _build_arm_table(results: Results, costs: Mapping[str, Mapping[str, float]]) -> Table:
    most = max((cost["flops"] for cost in costs.values()), default=1.0)
    unit = 10 ** int(np.log10(max(most, 1.0)))
    headings = ["arm", *COST_HEADINGS, f"gain in reward over SFT per {unit:.0e} FLOPs"]
    rows = []
    for name in results.names:
        if name not in costs:
            rows.append([name, "failed", *[""] * (len(headings) - 2)])
            continue
        base = find_sibling(results, name, "sft")
        seeds = results.list_comparable_seeds("score", name, base)
        ratio = ""
        if seeds and name != base and not name.endswith("best-of-n"):
            more = (costs[name]["flops"] - costs[base]["flops"]) / unit
            gain = subtract_values(results, name, base, "score", seeds)
            ratio = format_interval(compute_crossed_mean_interval(gain / more)) if more > 0 else ""
        rows.append([format_arm_label(results, name), *_format_costs(costs[name]), ratio])
    note = "The gain over SFT divided by the additional cost over SFT; intervals are of the gain."
    return Table(headings, rows, [note])


def _plot_all(results: Results, costs: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    points = {}
    for name in (name for name in results.plain if not name.endswith("best-of-n")):  # its cost is at every use
        flops = costs[name]["flops"] / 1e12
        reward = estimate_mean(results, name, "score")
        points[name] = figures.Point(format_arm_label(results, name), figures.exact_interval(flops), reward)
    x = "model FLOPs (1e12), all stages of the arm"
    return [
        figures.plot_plane(own, name=f"reward-by-flops{f'-{i}' if i else ''}", x=x, y=measure.title)
        for i, measure in enumerate(measure for measure in list_measures(results) if measure.key == "score")
        if (own := [points[name] for name in measure.names if name in points])
    ]


def _compare_samples_needed(results: Results, run: Run) -> tuple[str, Group] | None:
    """Completions that MPO's PPO samples until it reaches PPO's final reward (claim of the paper's v2)."""
    traces = {trace.arm: trace for trace in load_traces(results)}
    one, other = results.qualify_name(run, "mpo"), results.qualify_name(run, "ppo")
    if not {one, other} <= traces.keys():
        return None
    seeds = [seed for seed in traces[one].seeds if seed in traces[other].seeds]
    if not seeds:
        return None
    mpo, ppo = traces[one].select_seeds(seeds), traces[other].select_seeds(seeds)
    ahead = np.stack([mpo.values("score", point) - ppo.values("score", -1) for point in range(mpo.num_points)])
    reached = estimate_crossing(mpo.completions_sampled, ahead)
    completions_by_stage = {stage.key: 2 * stage.summary["pairs"] for stage in results.list_stages_of_kind("Samples")}
    pairs = np.mean(
        [sum(completions_by_stage.get(key, 0) for key in results.finished_by_seed(one)[seed].needs) for seed in seeds]
    )
    missing = note_missing_seeds(results, len(seeds), one, other)
    text = f"{other} samples {ppo.completions_sampled[-1]:,.0f} completions{missing}; {one}'s PPO "
    if np.isfinite(reached.mean):
        bounds = f" [{reached.low:,.0f}, {reached.high:,.0f}]" if np.isfinite(reached.high) else ""
        text += f"reaches the final reward of {other} after {reached.mean:,.0f}{bounds}, or "
        text += f"{reached.mean + pairs:,.0f} with the {pairs:,.0f} sampled for its pairs"
        text += "" if bounds else " (by the means; it is nowhere significantly above that reward)"
    else:
        text += f"does not reach the final reward of {other} within its {mpo.completions_sampled[-1]:,.0f} completions "
        text += f"and the {pairs:,.0f} sampled for its pairs"
    paths = {
        trace.arm: [
            figures.Point("", figures.exact_interval(x), trace.estimate_mean("score", point))
            for point, x in enumerate(trace.completions_sampled)
        ]
        for trace in (ppo, mpo)
    }
    figure = figures.plot_paths(paths, name="reward-by-samples", x="completions sampled by PPO", y="reward")
    notes = [
        f"{text}.",
        "The figure counts the completions that PPO samples. Rewards are on test prompts, at the start, the snapshots "
        "and the end, with straight lines between.",
    ]
    return text, Group("Samples", [figure], notes=notes)


def estimate_crossing(
    x: Float64[np.ndarray, " points"], ahead: Float64[np.ndarray, "points seeds prompts"]
) -> Interval:
    """The x at which the mean of `ahead`, linear between the points, first reaches 0; nan if it never does.

    The bounds are where the interval of `ahead` first contains 0 and where it first lies above 0 (Fieller 1954); nan
    where it never does.
    """
    grid = np.union1d(np.linspace(x[0], x[-1], GRID_POINTS), x)
    right = np.clip(np.searchsorted(x, grid), 1, len(x) - 1)
    weight = ((grid - x[right - 1]) / (x[right] - x[right - 1]))[:, None, None]
    intervals = [
        compute_crossed_mean_interval(values) for values in (1 - weight) * ahead[right - 1] + weight * ahead[right]
    ]
    low = find_first_crossing(grid, np.array([interval.high for interval in intervals]))
    high = find_first_crossing(grid, np.array([interval.low for interval in intervals]))
    return Interval(find_first_crossing(x, ahead.mean(axis=(1, 2))), low, high)


def find_first_crossing(x: Float64[np.ndarray, " points"], y: Float64[np.ndarray, " points"]) -> float:
    """The x at which the line through the points first reaches 0; nan if it never does."""
    if not (y >= 0).any():
        return math.nan
    i = int(np.argmax(y >= 0))
    return float(np.interp(0.0, y[i - 1 : i + 1], x[i - 1 : i + 1]) if i else x[0])


def _format_costs(cost: Mapping[str, float]) -> list[str]:
    tokens = [f"{cost[name]:,.0f}" for name in SUMMED_COSTS[1:3]]
    return [f"{cost['seconds']:,.1f}", *tokens, f"{cost['flops']:.2e}", f"{cost['peak_memory_mib']:,.0f}"]


def _write_opening(
    results: Results,
    by_seed: Mapping[str, Mapping[int, Mapping[str, float]]],
    costs: Mapping[str, Mapping[str, float]],
    needed: Sequence[str],
) -> str:
    total = sum(stage.summary["cost"]["seconds"] for stage in results.stages)
    text = f"The {len(results.stages)} stages of all arms and seeds took {format_duration(total)}"
    for run in results.runs:
        mpo, ppo = results.qualify_name(run, "mpo"), results.qualify_name(run, "ppo")
        if {mpo, ppo} <= costs.keys():
            ratio = _format_flops_ratio(by_seed[mpo], by_seed[ppo])
            text += (
                f"; {mpo}, with all its stages, needs {ratio} the FLOPs of {ppo} and "
                f"samples {costs[mpo]['tokens_sampled']:,.0f} tokens instead of {costs[ppo]['tokens_sampled']:,.0f}"
            )
    return ". ".join([text, *needed]) + "."


def _format_flops_ratio(mpo: Mapping[int, Mapping[str, float]], ppo: Mapping[int, Mapping[str, float]]) -> str:
    """The ratio of mpo's FLOPs to ppo's, summed over their common seeds, with its range over seeds."""
    both = [(cost["flops"], ppo[seed]["flops"]) for seed, cost in mpo.items() if seed in ppo]
    if not both:
        return "(at no common seed)"
    each = [mpo / ppo for mpo, ppo in both]
    mean = f"{sum(mpo for mpo, _ in both) / sum(ppo for _, ppo in both):.2f}"
    span = f" ({min(each):.2f} to {max(each):.2f} over the seeds)" if len(each) > 1 else ""
    return f"{mean}{span} times"


def format_duration(seconds: float) -> str:
    """`95 s`, `12 min`, `2.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
