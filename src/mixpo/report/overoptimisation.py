"""The optimised reward against a reward that was not optimised, along training (Gao et al. 2022)."""

from mixpo.algorithms.intervals import compute_crossed_mean_interval
from mixpo.experiments.results import MEASURES, Results
from mixpo.report import figures
from mixpo.report.comparison import (
    describe_sample,
    estimate_differences,
    find_sibling,
    format_interval,
    format_with_p,
    note_missing_seeds,
    subtract_values,
)
from mixpo.report.document import Group, Section, Table
from mixpo.report.traces import Trace, load_traces


def build_overoptimisation_section(results: Results) -> Section | None:
    """The section with gains over SFT in both rewards, of every arm and along training."""
    yardsticks = [key for key in ("true_reward", "second_score") if results.have_column(results.finished, key)]
    if not yardsticks:
        return None
    yardstick, label = yardsticks[0], MEASURES[yardsticks[0]]
    bases = {name: find_sibling(results, name, "sft") for name in results.plain}
    points, missing = [], []
    for name, base in bases.items():
        if seeds := results.list_comparable_seeds("score", name, base):
            gains = (subtract_values(results, name, base, key, seeds) for key in ("score", yardstick))
            points.append(figures.Point(name, *map(compute_crossed_mean_interval, gains)))
        if name != base and (note := note_missing_seeds(results, len(seeds), name, base)):
            missing.append(f"{name}: {note[2:-1]}.")
    traces = load_traces(results)
    groups = []
    if len(points) > len(set(bases.values())):
        plane = figures.plot_plane(points, name="gains", x="gain in reward over SFT", y=f"gain in {label} over SFT")
        groups.append(Group("Both rewards of every arm", [plane], notes=missing))
    if traces:
        paths = {
            f"{trace.arm}, {MEASURES[key]}": trace.list_points(key) for trace in traces for key in ("score", yardstick)
        }
        figure = figures.plot_paths(
            paths,
            name="over-optimisation",
            x="KL from SFT (nats per completion)",
            y="reward",
            dashed=[path for path in paths if path.endswith(label)],
        )
        groups.append(Group("Along training", [figure], _build_trace_table(results, traces, yardstick)))
    risen, significant, diverging = _list_divergences(results, yardstick)
    if diverging:
        headings = ["arm", "seed", "gain in reward over SFT", "p", f"gain in {label} over SFT", "p"]
        headings += ["KL from SFT", "end rate"]
        note = (
            "By means at one seed each, points of sweeps included; intervals over test prompts. p corrected for all "
            "arms and seeds (Holm)."
        )
        groups.append(Group(f"More reward, less {label}", table=Table(headings, diverging, [note])))
    if not groups:
        return None
    opening = _write_opening(results, traces, yardstick, (risen, significant, len(diverging)))
    return Section("over-optimisation", "Over-optimisation", opening, groups)


def _list_divergences(results: Results, yardstick: str) -> tuple[int, int, list[list[str]]]:
    """The arms and seeds whose mean reward is above SFT's: their number, and a row where the yardstick is below SFT's.

    Between the two stands the number of rows in which both differences are significant.
    """
    cases = [
        (name, base, seed)
        for name in results.finished
        if name != (base := find_sibling(results, name, "sft"))
        for seed in results.list_comparable_seeds("score", name, base)
    ]
    gains = [
        estimate_differences(
            [(name, base, subtract_values(results, name, base, key, [seed])) for name, base, seed in cases]
        )
        for key in ("score", yardstick)
    ]
    risen, significant, rows = 0, 0, []
    for (name, _, seed), reward, real in zip(cases, *gains, strict=True):
        risen += reward.interval.mean > 0
        if reward.interval.mean > 0 > real.interval.mean:
            significant += reward.sign > 0 > real.sign
            kl, ended = (float(results.values(name, key, [seed]).mean()) for key in ("kl_from_sft", "ended"))
            cells = [*format_with_p(reward), *format_with_p(real), f"{kl:.2f}", f"{ended:.0%}"]
            rows.append([name, str(seed), *cells])
    return risen, significant, rows


def _build_trace_table(results: Results, traces: list[Trace], yardstick: str) -> Table:
    rows = []
    for trace in traces:
        for point in range(trace.num_points):
            label = "start" if point == 0 else "end" if point == trace.num_points - 1 else f"snapshot {point}"
            cells = [format_interval(trace.estimate_mean(key, point)) for key in ("kl_from_sft", "score", yardstick)]
            name = trace.arm + note_missing_seeds(results, len(trace.seeds), trace.arm)
            rows.append([name, label, f"{trace.completions_sampled[point]:,.0f}", *cells])
    return Table(["arm", "point", "completions sampled", "KL from SFT", "reward", MEASURES[yardstick]], rows)


def _write_opening(results: Results, traces: list[Trace], yardstick: str, counts: tuple[int, int, int]) -> str:
    label, (risen, significant, diverging) = MEASURES[yardstick], counts
    text = f"{diverging} of the {risen} arms and seeds with a higher mean reward than SFT have a lower {label} than SFT"
    text += f", {significant} of them significantly in both" if diverging else ""
    if not traces:
        return f"{text}."
    changes = [
        estimate_differences([(one.arm, one.arm, one.values(key, -1) - one.values(key, start)) for one in traces])
        for start in (0, -2)
        for key in ("score", yardstick)
    ]
    for trace, reward, real, late_reward, late in zip(traces, *changes, strict=True):
        values = [format_interval(each.interval) for each in (reward, real, late_reward, late)]
        trend = ": both still rise significantly" if late_reward.sign == late.sign == 1 else ""
        if late_reward.sign > 0 > late.sign:
            trend = f": the reward rises significantly while {label} falls"
        missing = note_missing_seeds(results, len(trace.seeds), trace.arm)
        text += (
            f". During PPO of {trace.arm}{missing} the reward changes by {values[0]} "
            f"and {label} by {values[1]}; from the last snapshot to the end by {values[2]} and {values[3]}{trend}"
        )
    longest = max(len(trace.seeds) for trace in traces)
    return f"{text} (95% intervals {describe_sample(results, longest)})."
