"""The optimised reward against a reward that was not optimised, along training (Gao et al. 2022)."""

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, crossed_interval
from mixpo.experiments.results import MEASURES, Results
from mixpo.report import figures
from mixpo.report.comparison import (
    Difference,
    describe_sample,
    estimate_differences,
    find_significant_sign,
    format_interval,
    format_p_value,
    note_missing_seeds,
)
from mixpo.report.document import Group, Section, Table
from mixpo.report.traces import Trace, load_traces


def build_overoptimisation_section(results: Results) -> Section | None:
    """The section with gains over SFT in both rewards, of every arm and along training."""
    yardstick = next(
        (key for key in ("true_reward", "second_score") if results.have_column(results.finished, key)), None
    )
    if yardstick is None:
        return None
    label = MEASURES[yardstick]
    bases = {name: results.qualify_name(results.find_run(name), "sft") for name in results.plain}
    points = [
        figures.Point(
            name, _estimate_gain(results, name, base, "score"), _estimate_gain(results, name, base, yardstick)
        )
        for name, base in bases.items()
        if results.list_comparable_seeds("score", name, base)
    ]
    traces = load_traces(results)
    groups = []
    if len(points) > len(set(bases.values())):
        plane = figures.plot_plane(points, name="gains", x="gain in reward over SFT", y=f"gain in {label} over SFT")
        notes = [
            f"{name}: {note[2:-1]}."
            for name, base in bases.items()
            if (note := _note_missing_seeds(results, name, base))
        ]
        groups.append(Group("Both rewards of every arm", [plane], notes=notes))
    if traces:
        paths = {
            f"{trace.arm}, {MEASURES[key]}": [
                figures.Point("", trace.estimate_mean("kl_from_sft", n), trace.estimate_mean(key, n))
                for n in range(trace.num_points)
            ]
            for trace in traces
            for key in ("score", yardstick)
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
        notes = [
            "By means at one seed each, points of sweeps included; intervals over test prompts. p corrected for all "
            "arms and seeds (Holm)."
        ]
        groups.append(Group(f"More reward, less {label}", table=Table(headings, diverging, notes)))
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
        if name != (base := results.qualify_name(results.find_run(name), "sft"))
        for seed in results.list_comparable_seeds("score", name, base)
    ]
    gains = [
        estimate_differences(
            [(name, base, _estimate_difference(results, name, base, key, [seed])) for name, base, seed in cases]
        )
        for key in ("score", yardstick)
    ]
    risen, significant, rows = 0, 0, []
    for (name, _, seed), reward, real in zip(cases, *gains, strict=True):
        risen += reward.interval.mean > 0
        if reward.interval.mean > 0 > real.interval.mean:
            significant += _is_divergence(reward, real)
            cells = [
                text for each in (reward, real) for text in (format_interval(each.interval), format_p_value(each.p))
            ]
            kl, ended = (float(results.values(name, key, [seed]).mean()) for key in ("kl_from_sft", "ended"))
            rows.append([name, str(seed), *cells, f"{kl:.2f}", f"{ended:.0%}"])
    return risen, significant, rows


def _is_divergence(reward: Difference, real: Difference) -> bool:
    """True if the reward rises and the yardstick falls, both significantly."""
    return find_significant_sign(reward.interval, reward.p) > 0 > find_significant_sign(real.interval, real.p)


def _estimate_difference(
    results: Results, name: str, base: str, key: str, seeds: list[int]
) -> Float64[np.ndarray, "seeds prompts"]:
    return np.asarray(results.values(name, key, seeds) - results.values(base, key, seeds))


def _estimate_gain(results: Results, name: str, base: str, key: str) -> Interval:
    return crossed_interval(
        _estimate_difference(results, name, base, key, results.list_comparable_seeds("score", name, base))
    )


def _note_missing_seeds(results: Results, name: str, base: str) -> str:
    return (
        note_missing_seeds(results, len(results.list_comparable_seeds("score", name, base)), name, base)
        if name != base
        else ""
    )


def _build_trace_table(results: Results, traces: list[Trace], yardstick: str) -> Table:
    rows = []
    for trace in traces:
        for point in range(trace.num_points):
            label = "start" if point == 0 else "end" if point == trace.num_points - 1 else f"snapshot {point}"
            cells = [format_interval(trace.estimate_mean(key, point)) for key in ("kl_from_sft", "score", yardstick)]
            name = trace.arm + note_missing_seeds(results, len(trace.seeds), trace.arm)
            rows.append([name, label, f"{trace.completions_sampled[point]:,.0f}", *cells])
    return Table(["arm", "point", "completions sampled", "KL from SFT", "reward", MEASURES[yardstick]], rows)


def _estimate_changes(traces: list[Trace], key: str, start: int) -> list[Difference]:
    """Changes of a column from a point to the end, paired by prompt; p corrected for the number of arms."""
    ends = [(trace.values(key, trace.num_points - 1), trace.values(key, start)) for trace in traces]
    return estimate_differences(
        [(trace.arm, trace.arm, end - before) for trace, (end, before) in zip(traces, ends, strict=True)]
    )


def _write_opening(results: Results, traces: list[Trace], yardstick: str, counts: tuple[int, int, int]) -> str:
    label, (risen, significant, diverging) = MEASURES[yardstick], counts
    text = f"{diverging} of the {risen} arms and seeds with a higher mean reward than SFT have a lower {label} than SFT"
    text += f", {significant} of them significantly in both" if diverging else ""
    if not traces:
        return f"{text}."
    changes = [_estimate_changes(traces, key, start) for start in (0, -2) for key in ("score", yardstick)]
    for trace, reward, real, late_reward, late in zip(traces, *changes, strict=True):
        values = [format_interval(each.interval) for each in (reward, real, late_reward, late)]
        missing = note_missing_seeds(results, len(trace.seeds), trace.arm)
        text += (
            f". During PPO of {trace.arm}{missing} the reward changes by {values[0]} "
            f"and {label} by {values[1]}; from the last snapshot to the end by {values[2]} and {values[3]}"
            f"{_describe_late_change(late_reward, late, label)}"
        )
    longest = max((trace.seeds for trace in traces), key=len)
    return f"{text} (95% intervals {describe_sample(results, longest)})."


def _describe_late_change(reward: Difference, real: Difference, label: str) -> str:
    """The significant directions of both rewards after the last snapshot, if they have any."""
    if _is_divergence(reward, real):
        return f": the reward rises significantly while {label} falls"
    if find_significant_sign(reward.interval, reward.p) > 0 and find_significant_sign(real.interval, real.p) > 0:
        return ": both still rise significantly"
    return ""
