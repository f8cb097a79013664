"""Costs by arm and by stage in tokens, model FLOPs, seconds and memory, and the gain in reward per cost."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, compute_crossed_mean_interval
from mixpo.experiments.results import Results, Run, StageResult, format_first_names, read_evaluation_summary
from mixpo.experiments.run import ArmResult
from mixpo.report import figures
from mixpo.report.comparison import (
    estimate_mean,
    format_arm_label,
    format_interval,
    list_measures_by_scale,
    name_arm_of_same_run,
    note_missing_seeds,
    subtract_arm_values,
)
from mixpo.report.document import Figure, Section, SectionGroup, Table
from mixpo.report.traces import load_ppo_traces

SUMMED_COSTS = ("seconds", "tokens_sampled", "tokens_trained", "flops")
MEMORY = "peak_memory_mib"
GRID_POINTS = 65
"""Numbers of completions at which MPO's reward is compared with PPO's."""
COST_HEADINGS = ("seconds", "tokens sampled", "tokens trained", "FLOPs", "peak memory (MiB)")


def build_cost_section(results: Results) -> Section | None:
    """The section with cost by arm and stage, reward by FLOPs, completions MPO and PPO need; None without stages."""
    stages = {stage.key: stage for stage in results.stages}
    if not stages:
        return None
    by_seed = {name: _sum_costs_by_seed(results, name, stages) for name in results.finished_arms}
    costs = {
        name: {key: float(np.mean([cost[key] for cost in seeds.values()])) for key in (*SUMMED_COSTS, MEMORY)}
        for name, seeds in by_seed.items()
    }
    needed = [part for run in results.runs if (part := _compare_samples_to_reach_ppo(results, run)) is not None]
    parallel = any(run.recipe.get("runtime", {}).get("workers", 1) > 1 for run in results.runs)
    note = (
        "An arm's cost is the sum over the stages that it needs, averaged over its finished seeds. Shared stages count "
        "for every arm; evaluations, reward models that only evaluations use, and sampled pairs of which only the "
        f"prompts are used (ppo) do not count. {_describe_best_of_n_cost(results)}FLOPs: 2 per weight and token "
        "forward, 6 forward and backward. Seconds and memory depend on the machine and its "
        f"load{', here other stages of the run (runtime.workers)' if parallel else ''}."
    )
    first = [stage for stage in results.stages if results.seeds[0] in stage.seeds]
    rows = [[stage.key, format_first_names(stage.arms), *_format_cost_cells(stage.summary["cost"])] for stage in first]
    which = [f"Seed {results.seeds[0]} only."] if len(results.seeds) > 1 else []
    groups = [
        SectionGroup("By arm", _plot_reward_by_flops(results, costs), _build_arm_cost_table(results, costs)),
        *(group for _, group in needed),
        SectionGroup("By stage", table=Table(["stage", "arms", *COST_HEADINGS], rows, which)),
        SectionGroup(notes=[note]),
    ]
    return Section("cost", "Cost", _summarize_costs(results, by_seed, costs, [text for text, _ in needed]), groups)


def _describe_best_of_n_cost(results: Results) -> str:
    """A sentence on the tokens that best-of-n samples per prompt; empty if it did not finish."""
    best = results.find_finished_name("best-of-n")
    if best is None:
        return ""
    summary = read_evaluation_summary(next(iter(results.get_finished_by_seed(best).values())))
    each = summary["cost"]["tokens_sampled"] / summary["prompts"]
    return f"best-of-n has its cost at every use: {each:,.0f} sampled tokens per prompt. "


def list_charged_stages(arm_result: ArmResult) -> list[str]:
    """Keys of the stages that count as an arm's cost; no `Samples` if it uses only the prompts of the pairs."""
    if {"Selection", "DPO"} & {key.partition("-")[0] for key in arm_result.needs}:
        return arm_result.needs
    return [key for key in arm_result.needs if not key.startswith("Samples-")]


def _sum_costs_by_seed(results: Results, arm: str, stages: Mapping[str, StageResult]) -> dict[int, dict[str, float]]:
    """An arm's costs by seed and name: sums over its stages, but of peak memory the maximum."""
    costs = {}
    for seed, result in results.get_finished_by_seed(arm).items():
        parts = [stages[key].summary["cost"] for key in list_charged_stages(result) if key in stages]
        total = {key: sum(float(cost[key]) for cost in parts) for key in SUMMED_COSTS}
        costs[seed] = {**total, MEMORY: max((float(cost[MEMORY]) for cost in parts), default=0.0)}
    return costs


def _build_arm_cost_table(results: Results, costs_by_arm: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for every arm: its costs, and its gain in reward over SFT per additional FLOPs."""
    most = max((cost["flops"] for cost in costs_by_arm.values()), default=1.0)
    unit = 10 ** int(np.log10(max(most, 1.0)))
    headings = ["arm", *COST_HEADINGS, f"gain in reward over SFT per {unit:.0e} FLOPs"]
    rows = []
    for name in results.arm_names:
        if name not in costs_by_arm:
            rows.append([name, "failed", *[""] * (len(headings) - 2)])
            continue
        base = name_arm_of_same_run(results, name, "sft")
        seeds = results.list_seeds_with_same_scorer("score", name, base)
        ratio = ""
        if seeds and name != base and not name.endswith("best-of-n"):
            more = (costs_by_arm[name]["flops"] - costs_by_arm[base]["flops"]) / unit
            gain = subtract_arm_values(results, name, base, "score", seeds)
            ratio = format_interval(compute_crossed_mean_interval(gain / more)) if more > 0 else ""
        rows.append([format_arm_label(results, name), *_format_cost_cells(costs_by_arm[name]), ratio])
    note = "The gain over SFT divided by the additional cost over SFT; intervals are of the gain."
    return Table(headings, rows, [note])


def _plot_reward_by_flops(results: Results, costs_by_arm: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    """Figures of mean reward by model FLOPs, one for each reward scale; without best-of-n."""
    points = {}
    for name in (
        name for name in results.finished_recipe_arms if not name.endswith("best-of-n")
    ):  # its cost is at every use
        flops = costs_by_arm[name]["flops"] / 1e12
        reward = estimate_mean(results, name, "score")
        points[name] = figures.Point(format_arm_label(results, name), figures.exact_interval(flops), reward)
    x = "model FLOPs (1e12), all stages of the arm"
    return [
        figures.plot_points(own, name=f"reward-by-flops{f'-{i}' if i else ''}", xlabel=x, ylabel=measure.title)
        for i, measure in enumerate(measure for measure in list_measures_by_scale(results) if measure.key == "score")
        if (own := [points[name] for name in measure.names if name in points])
    ]


def _compare_samples_to_reach_ppo(results: Results, run: Run) -> tuple[str, SectionGroup] | None:
    """A sentence and a figure on the completions MPO samples until it reaches PPO's final reward; None without both."""
    traces = {trace.arm: trace for trace in load_ppo_traces(results)}
    one, other = results.qualify_arm_name(run, "mpo"), results.qualify_arm_name(run, "ppo")
    if not {one, other} <= traces.keys():
        return None
    seeds = [seed for seed in traces[one].seeds if seed in traces[other].seeds]
    if not seeds:
        return None
    mpo, ppo = traces[one].select_seeds(seeds), traces[other].select_seeds(seeds)
    ahead = np.stack(
        [mpo.read_values("score", n) - ppo.read_values("score", -1) for n in range(mpo.evaluations_per_seed)]
    )
    reached = estimate_zero_crossing(mpo.completions_sampled, ahead)
    completions_by_stage = {stage.key: 2 * stage.summary["pairs"] for stage in results.list_stages_of_kind("Samples")}
    by_seed = results.get_finished_by_seed(one)
    pairs = np.mean([sum(completions_by_stage.get(key, 0) for key in by_seed[seed].needs) for seed in seeds])
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
            figures.Point("", figures.exact_interval(x), trace.estimate_mean_at("score", point))
            for point, x in enumerate(trace.completions_sampled)
        ]
        for trace in (ppo, mpo)
    }
    figure = figures.plot_paths(paths, name="reward-by-samples", xlabel="completions sampled by PPO", ylabel="reward")
    notes = [
        f"{text}.",
        "The figure counts the completions that PPO samples. Rewards are on test prompts, at the start, the snapshots "
        "and the end, with straight lines between.",
    ]
    return text, SectionGroup("Samples", [figure], notes=notes)


def estimate_zero_crossing(
    x: Float64[np.ndarray, " points"], y: Float64[np.ndarray, "points seeds prompts"]
) -> Interval:
    """The first x, with interval, at which the mean of y, linear between the points, reaches 0; nan if it never does.

    The bounds are where the interval of y first contains 0 and where it first lies above 0 (Fieller 1954).
    """
    grid = np.union1d(np.linspace(x[0], x[-1], GRID_POINTS), x)
    right = np.clip(np.searchsorted(x, grid), 1, len(x) - 1)
    weight = ((grid - x[right - 1]) / (x[right] - x[right - 1]))[:, None, None]
    intervals = [compute_crossed_mean_interval(values) for values in (1 - weight) * y[right - 1] + weight * y[right]]
    low = find_first_zero_crossing(grid, np.array([interval.high for interval in intervals]))
    high = find_first_zero_crossing(grid, np.array([interval.low for interval in intervals]))
    return Interval(find_first_zero_crossing(x, y.mean(axis=(1, 2))), low, high)


def find_first_zero_crossing(x: Float64[np.ndarray, " points"], y: Float64[np.ndarray, " points"]) -> float:
    """The first x at which y, linear between the points, reaches 0 or more; nan if it never does."""
    if not (y >= 0).any():
        return math.nan
    i = int(np.argmax(y >= 0))
    return float(np.interp(0.0, y[i - 1 : i + 1], x[i - 1 : i + 1]) if i else x[0])


def _format_cost_cells(costs: Mapping[str, float]) -> list[str]:
    """Table cells of seconds, tokens sampled, tokens trained, FLOPs and peak memory."""
    tokens = [f"{costs[name]:,.0f}" for name in SUMMED_COSTS[1:3]]
    return [f"{costs['seconds']:,.1f}", *tokens, f"{costs['flops']:.2e}", f"{costs['peak_memory_mib']:,.0f}"]


def _summarize_costs(
    results: Results,
    costs_by_seed: Mapping[str, Mapping[int, Mapping[str, float]]],
    costs: Mapping[str, Mapping[str, float]],
    sample_sentences: Sequence[str],
) -> str:
    """The opening text: seconds of all stages, MPO's FLOPs and tokens relative to PPO's, and the given sentences."""
    total = sum(stage.summary["cost"]["seconds"] for stage in results.stages)
    text = f"The {len(results.stages)} stages of all arms and seeds took {format_duration(total)}"
    for run in results.runs:
        mpo, ppo = results.qualify_arm_name(run, "mpo"), results.qualify_arm_name(run, "ppo")
        if {mpo, ppo} <= costs.keys():
            ratio = _format_flops_ratio(costs_by_seed[mpo], costs_by_seed[ppo])
            text += (
                f"; {mpo}, with all its stages, needs {ratio} the FLOPs of {ppo} and "
                f"samples {costs[mpo]['tokens_sampled']:,.0f} tokens instead of {costs[ppo]['tokens_sampled']:,.0f}"
            )
    return ". ".join([text, *sample_sentences]) + "."


def _format_flops_ratio(mpo: Mapping[int, Mapping[str, float]], ppo: Mapping[int, Mapping[str, float]]) -> str:
    """`1.50 (1.20 to 1.80 over the seeds) times`: mpo's FLOPs over ppo's at common seeds, from their costs by seed."""
    both = [(cost["flops"], ppo[seed]["flops"]) for seed, cost in mpo.items() if seed in ppo]
    if not both:
        return "(at no common seed)"
    each = [mpo / ppo for mpo, ppo in both]
    mean = f"{sum(mpo for mpo, _ in both) / sum(ppo for _, ppo in both):.2f}"
    span = f" ({min(each):.2f} to {max(each):.2f} over the seeds)" if len(each) > 1 else ""
    return f"{mean}{span} times"


def format_duration(seconds: float) -> str:
    """A duration as `95 s`, `12 min` or `2.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
