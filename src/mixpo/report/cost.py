"""At what cost? Tokens, model FLOPs, seconds and memory by arm and by stage, and what a unit of them buys."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, crossed_interval
from mixpo.experiments.results import Results, Run, StageFolder, list_first, read_evaluation
from mixpo.experiments.run import ArmResult
from mixpo.report import figures
from mixpo.report.comparison import fewer, interval_text, label, mean_of
from mixpo.report.document import Figure, Group, Section, Table
from mixpo.report.traces import traced

COUNTED = ("seconds", "tokens_sampled", "tokens_trained", "flops")
MEMORY = "peak_memory_mib"
TRIED = 65
"""Numbers of samples at which MPO's reward is held against PPO's."""
HEADINGS = ("seconds", "tokens sampled", "tokens trained", "FLOPs", "peak memory (MiB)")


def section(results: Results) -> Section | None:
    """Cost by arm, reward by cost, samples that MPO and PPO need, cost by stage."""
    stages = {stage.key: stage for stage in results.stages}
    if not stages:
        return None
    by_seed = {name: _costs(results, name, stages) for name in results.finished}
    spent = {
        name: {key: float(np.mean([cost[key] for cost in costs.values()])) for key in (*COUNTED, MEMORY)}
        for name, costs in by_seed.items()
    }
    groups = [Group("By arm", _pictures(results, spent), _arm_table(results, spent))]
    needed = [found for run in results.runs if (found := _samples_needed(results, run)) is not None]
    groups += [group for _, group in needed]
    groups.append(Group("By stage", table=_stage_table(results)))
    groups.append(
        Group(
            notes=[
                "An arm's cost is the sum over the stages that it needs, averaged over the seeds at which it finished: "
                "shared stages count for each arm; evaluations do not, nor a reward model that only they read, nor "
                f"sampled pairs of which only the prompts are read (ppo). {_of_best(results)}Tokens "
                "and FLOPs are counted (2 a weight and token forward, 6 forward and backward); seconds and memory are "
                f"this machine's, with whatever else it was doing{_beside(results)}."
            ]
        )
    )
    return Section("cost", "Cost", _opening(results, by_seed, spent, [text for text, _ in needed]), groups)


def _beside(results: Results) -> str:
    """What else it was doing where stages are computed side by side."""
    several = any(run.recipe.get("runtime", {}).get("workers", 1) > 1 for run in results.runs)
    return ", such as other stages of the run (runtime.workers)" if several else ""


def _of_best(results: Results) -> str:
    best = results.first("best-of-n")
    if best is None:
        return ""
    summary = read_evaluation(next(iter(results.done(best).values())))
    each = summary["cost"]["tokens_sampled"] / summary["prompts"]
    return f"best-of-n pays at every use instead: {each:,.0f} tokens sampled a prompt. "


def stands_on(arm: ArmResult) -> list[str]:
    """The stages that an arm needs. PPO on samples of which nothing reads the pairs takes only their prompts."""
    if {"Selection", "DPO"} & {key.partition("-")[0] for key in arm.needs}:
        return arm.needs
    return [key for key in arm.needs if not key.startswith("Samples-")]


def _costs(results: Results, name: str, stages: Mapping[str, StageFolder]) -> dict[int, dict[str, float]]:
    """An arm's cost by seed: sums over its stages, and the peak of their memory."""
    costs = {}
    for seed, arm in results.done(name).items():
        own = [stages[key].summary["cost"] for key in stands_on(arm) if key in stages]
        total = {key: sum(float(cost[key]) for cost in own) for key in COUNTED}
        costs[seed] = {**total, MEMORY: max((float(cost[MEMORY]) for cost in own), default=0.0)}
    return costs


def _arm_table(results: Results, spent: Mapping[str, Mapping[str, float]]) -> Table:
    most = max((cost["flops"] for cost in spent.values()), default=1.0)
    unit = 10 ** int(np.log10(max(most, 1.0)))
    headings = ["arm", *HEADINGS, f"gain in reward over SFT per {unit:.0e} FLOPs"]
    rows = []
    for name in results.names:
        if name not in spent:
            rows.append([name, "failed", *[""] * (len(headings) - 2)])
            continue
        base = results.named(results.run_of(name), "sft")
        seeds = results.comparable("score", name, base)
        per = ""
        if seeds and name != base and not name.endswith("best-of-n"):
            gain = crossed_interval(results.values(name, "score", seeds) - results.values(base, "score", seeds))
            per = _per(gain, (spent[name]["flops"] - spent[base]["flops"]) / unit)
        rows.append([label(results, name), *_cells(spent[name]), per])
    note = "What an arm gains over SFT is divided by what it costs more than SFT; intervals are of the gain."
    return Table(headings, rows, [note])


def _per(gain: Interval, cost: float) -> str:
    return interval_text(Interval(gain.mean / cost, gain.low / cost, gain.high / cost)) if cost > 0 else ""


def _pictures(results: Results, spent: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    points = []
    for name in (name for name in results.plain if not name.endswith("best-of-n")):  # which pays at every use
        flops = spent[name]["flops"] / 1e12
        points.append(figures.Point(label(results, name), figures.exactly(flops), mean_of(results, name, "score")))
    return [figures.plane(points, name="reward-by-flops", x="model FLOPs (1e12), all stages of the arm", y="reward")]


def _samples_needed(results: Results, run: Run) -> tuple[str, Group] | None:
    """How many completions MPO's PPO samples until it reaches the reward with which PPO ends (v2's claim)."""
    traces = {trace.arm: trace for trace in traced(results)}
    one, other = results.named(run, "mpo"), results.named(run, "ppo")
    if not {one, other} <= traces.keys():
        return None
    seeds = [seed for seed in traces[one].seeds if seed in traces[other].seeds]
    if not seeds:
        return None
    mpo, ppo = traces[one].at(seeds), traces[other].at(seeds)
    ahead = np.stack([mpo.values("score", point) for point in range(mpo.points)]) - ppo.values("score", ppo.points - 1)
    reached = reached_after(mpo.sampled, ahead)
    drawn_pairs = {stage.key: 2 * stage.summary["pairs"] for stage in results.stages_of("Samples")}
    pairs = np.mean([sum(drawn_pairs.get(key, 0) for key in results.done(one)[seed].needs) for seed in seeds])
    text = f"{other} samples {ppo.sampled[-1]:,.0f} completions{fewer(results, len(seeds), one, other)}"
    if np.isfinite(reached.mean):
        bounds = f" [{reached.low:,.0f}, {reached.high:,.0f}]" if np.isfinite(reached.high) else ""
        text += (
            f"; {one}'s PPO comes to the reward with which it ends after {reached.mean:,.0f}{bounds}, and with the "
            f"{pairs:,.0f} sampled for its pairs {one} has then sampled {reached.mean + pairs:,.0f}"
        )
        if not bounds:
            text += ", by the means: nowhere is it told to be above that reward"
    else:
        text += (
            f"; {one}'s PPO does not come to the reward with which it ends in its {mpo.sampled[-1]:,.0f} completions, "
            f"besides {pairs:,.0f} sampled for its pairs"
        )
    paths = {
        trace.arm: [
            figures.Point("", figures.exactly(x), trace.mean("score", point)) for point, x in enumerate(trace.sampled)
        ]
        for trace in (ppo, mpo)
    }
    picture = figures.paths(paths, name="reward-by-samples", x="completions sampled by PPO", y="reward")
    notes = [
        f"{text}.",
        "The picture counts PPO's own samples. Rewards on test prompts at the start, at the snapshots and at the end; "
        "straight lines between.",
    ]
    return text, Group("Samples", [picture], notes=notes)


def reached_after(x: Float64[np.ndarray, " points"], ahead: Float64[np.ndarray, "points seeds prompts"]) -> Interval:
    """Where the lines between the points first come to 0 in the mean; nan if they never do.

    The bounds are where the interval of `ahead` first holds 0 and where it first lies above it (Fieller 1954); nan
    where it never does.
    """
    tried = np.union1d(np.linspace(x[0], x[-1], TRIED), x)
    right = np.clip(np.searchsorted(x, tried), 1, len(x) - 1)
    weight = ((tried - x[right - 1]) / (x[right] - x[right - 1]))[:, None, None]
    found = [crossed_interval(values) for values in (1 - weight) * ahead[right - 1] + weight * ahead[right]]
    low, high = (first_reached(tried, np.array([getattr(one, end) for one in found])) for end in ("high", "low"))
    return Interval(first_reached(x, ahead.mean(axis=(1, 2))), low, high)


def first_reached(x: Float64[np.ndarray, " points"], y: Float64[np.ndarray, " points"]) -> float:
    """Where the line through the points first comes to 0; nan if it never does."""
    if y[0] >= 0:
        return float(x[0])
    for place in range(1, len(y)):
        if y[place] >= 0:
            share = y[place - 1] / (y[place - 1] - y[place])
            return float(x[place - 1] + share * (x[place] - x[place - 1]))
    return math.nan


def _stage_table(results: Results) -> Table:
    first = [stage for stage in results.stages if results.seeds[0] in stage.seeds]
    rows = [[stage.key, list_first(stage.arms), *_cells(stage.summary["cost"])] for stage in first]
    notes = [f"Seed {results.seeds[0]} only."] if len(results.seeds) > 1 else []
    return Table(["stage", "arms", *HEADINGS], rows, notes)


def _cells(cost: Mapping[str, float]) -> list[str]:
    counted = [f"{cost[name]:,.0f}" for name in COUNTED[1:3]]
    return [f"{cost['seconds']:,.1f}", *counted, f"{cost['flops']:.2e}", f"{cost['peak_memory_mib']:,.0f}"]


def _opening(
    results: Results,
    by_seed: Mapping[str, Mapping[int, Mapping[str, float]]],
    spent: Mapping[str, Mapping[str, float]],
    needed: Sequence[str],
) -> str:
    total = sum(stage.summary["cost"]["seconds"] for stage in results.stages)
    said = f"The {len(results.stages)} stages that the arms stand on took {time_text(total)}, all seeds together"
    for run in results.runs:
        mpo, ppo = results.named(run, "mpo"), results.named(run, "ppo")
        if {mpo, ppo} <= spent.keys():
            said += (
                f"; {mpo}, with all that it needs, takes {_times(by_seed[mpo], by_seed[ppo])} the FLOPs of {ppo}, and "
                f"samples {spent[mpo]['tokens_sampled']:,.0f} tokens to its {spent[ppo]['tokens_sampled']:,.0f}"
            )
    return ". ".join([said, *needed]) + "."


def _times(mpo: Mapping[int, Mapping[str, float]], ppo: Mapping[int, Mapping[str, float]]) -> str:
    """mpo's FLOPs over ppo's: of the sums over the seeds at which both finished, and the range over them."""
    both = [(cost["flops"], ppo[seed]["flops"]) for seed, cost in mpo.items() if seed in ppo]
    if not both:
        return "(at no common seed)"
    each = [mpo / ppo for mpo, ppo in both]
    mean = f"{sum(mpo for mpo, _ in both) / sum(ppo for _, ppo in both):.2f}"
    span = f" ({min(each):.2f} to {max(each):.2f} over the seeds)" if len(each) > 1 else ""
    return f"{mean}{span} times"


def time_text(seconds: float) -> str:
    """`95 s`, `12 min`, `2.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
