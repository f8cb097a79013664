"""The optimised reward against a reward that was not optimised, along training (Gao et al. 2022)."""

from mixpo.algorithms.intervals import compute_crossed_mean_interval
from mixpo.experiments.results import MEASURES, Results
from mixpo.report import figures
from mixpo.report.comparison import (
    describe_sample,
    estimate_differences,
    format_difference_cells,
    format_interval,
    name_arm_of_same_run,
    note_missing_seeds,
    subtract_arm_values,
)
from mixpo.report.distance import KL_AXIS
from mixpo.report.document import Section, SectionGroup, Table
from mixpo.report.traces import PPOTrace, load_ppo_traces


def build_overoptimisation_section(results: Results) -> Section | None:
    """The section with gains over SFT in the optimised and in an unoptimised reward; None without the latter."""
    yardsticks = [key for key in ("true_reward", "second_score") if results.have_column(results.finished_arms, key)]
    if not yardsticks:
        return None
    yardstick, label = yardsticks[0], MEASURES[yardsticks[0]]
    bases = {name: name_arm_of_same_run(results, name, "sft") for name in results.finished_recipe_arms}
    points, missing = [], []
    for name, base in bases.items():
        if seeds := results.list_seeds_with_same_scorer("score", name, base):
            gains = (subtract_arm_values(results, name, base, key, seeds) for key in ("score", yardstick))
            points.append(figures.Point(name, *map(compute_crossed_mean_interval, gains)))
        if name != base and (note := note_missing_seeds(results, len(seeds), name, base)):
            missing.append(f"{name}: {note[2:-1]}.")
    traces = load_ppo_traces(results)
    groups = []
    if len(points) > len(set(bases.values())):
        xlabel, ylabel = "gain in reward over SFT", f"gain in {label} over SFT"
        plane = figures.plot_points(points, name="gains", xlabel=xlabel, ylabel=ylabel)
        groups.append(SectionGroup("Both rewards of every arm", [plane], notes=missing))
    if traces:
        keys = ("score", yardstick)
        paths = {f"{one.arm}, {MEASURES[key]}": one.list_kl_points(key) for one in traces for key in keys}
        dashed = [path for path in paths if path.endswith(label)]
        figure = figures.plot_paths(paths, name="over-optimisation", xlabel=KL_AXIS, ylabel="reward", dashed=dashed)
        groups.append(SectionGroup("Along training", [figure], _build_trace_table(results, traces, yardstick)))
    risen, significant, diverging = _find_reward_divergences(results, yardstick)
    if diverging:
        headings = ["arm", "seed", "gain in reward over SFT", "p", f"gain in {label} over SFT", "p"]
        headings += ["KL from SFT", "end rate"]
        note = (
            "By means at one seed each, points of sweeps included; intervals over test prompts. p corrected for all "
            "arms and seeds (Holm)."
        )
        groups.append(SectionGroup(f"More reward, less {label}", table=Table(headings, diverging, [note])))
    if not groups:
        return None
    opening = _summarize_gains(results, traces, yardstick, (risen, significant, len(diverging)))
    return Section("over-optimisation", "Over-optimisation", opening, groups)


def _find_reward_divergences(results: Results, unoptimised: str) -> tuple[int, int, list[list[str]]]:
    """Counts of arms and seeds above SFT in reward, and of significant rows; rows of those below in the other."""
    cases = [
        (name, base, seed)
        for name in results.finished_arms
        if name != (base := name_arm_of_same_run(results, name, "sft"))
        for seed in results.list_seeds_with_same_scorer("score", name, base)
    ]
    gains = []
    for key in ("score", unoptimised):
        paired = [(arm, base, subtract_arm_values(results, arm, base, key, [seed])) for arm, base, seed in cases]
        gains.append(estimate_differences(paired))
    risen, significant, rows = 0, 0, []
    for (name, _, seed), reward, real in zip(cases, *gains, strict=True):
        risen += reward.interval.mean > 0
        if reward.interval.mean > 0 > real.interval.mean:
            significant += reward.significant_sign > 0 > real.significant_sign
            kl, ended = (
                float(results.get_evaluation_column(name, key, [seed]).mean()) for key in ("kl_from_sft", "ended")
            )
            cells = [*format_difference_cells(reward), *format_difference_cells(real), f"{kl:.2f}", f"{ended:.0%}"]
            rows.append([name, str(seed), *cells])
    return risen, significant, rows


def _build_trace_table(results: Results, traces: list[PPOTrace], unoptimised: str) -> Table:
    """A row for every evaluation along PPO: completions sampled, KL, and both rewards."""
    rows = []
    for trace in traces:
        for n in range(trace.evaluations_per_seed):
            label = "start" if n == 0 else "end" if n == trace.evaluations_per_seed - 1 else f"snapshot {n}"
            cells = [format_interval(trace.estimate_mean_at(key, n)) for key in ("kl_from_sft", "score", unoptimised)]
            name = trace.arm + note_missing_seeds(results, len(trace.seeds), trace.arm)
            rows.append([name, label, f"{trace.completions_sampled[n]:,.0f}", *cells])
    return Table(["arm", "point", "completions sampled", "KL from SFT", "reward", MEASURES[unoptimised]], rows)


def _summarize_gains(results: Results, traces: list[PPOTrace], unoptimised: str, counts: tuple[int, int, int]) -> str:
    """Sentences on how many arms gain reward but lose unoptimised reward, and on the changes of both during PPO."""
    label, (risen, significant, diverging) = MEASURES[unoptimised], counts
    text = f"{diverging} of the {risen} arms and seeds with a higher mean reward than SFT have a lower {label} than SFT"
    text += f", {significant} of them significantly in both" if diverging else ""
    if not traces:
        return f"{text}."
    changes = [
        estimate_differences([(t.arm, t.arm, t.read_values(key, -1) - t.read_values(key, start)) for t in traces])
        for start in (0, -2)
        for key in ("score", unoptimised)
    ]
    for trace, reward, real, late_reward, late in zip(traces, *changes, strict=True):
        values = [format_interval(each.interval) for each in (reward, real, late_reward, late)]
        trend = ": both still rise significantly" if late_reward.significant_sign == late.significant_sign == 1 else ""
        if late_reward.significant_sign > 0 > late.significant_sign:
            trend = f": the reward rises significantly while {label} falls"
        missing = note_missing_seeds(results, len(trace.seeds), trace.arm)
        text += (
            f". During PPO of {trace.arm}{missing} the reward changes by {values[0]} "
            f"and {label} by {values[1]}; from the last snapshot to the end by {values[2]} and {values[3]}{trend}"
        )
    longest = max(len(trace.seeds) for trace in traces)
    return f"{text} (95% intervals {describe_sample(results, longest)})."
