"""Is it real or hacked? The reward that was optimised against one that was not, along training (Gao et al. 2022)."""

import numpy as np
from jaxtyping import Float64

from mixpo.algorithms.intervals import Interval, crossed_interval
from mixpo.experiments.results import MEASURES, Results
from mixpo.report import figures
from mixpo.report.comparison import Difference, estimated, fewer, interval_text, over, p_text, sign
from mixpo.report.document import Group, Section, Table
from mixpo.report.traces import Trace, traced


def section(results: Results) -> Section | None:
    """Gains over SFT in both rewards, of every arm and along training."""
    yardstick = next((key for key in ("true_reward", "second_score") if results.has(results.finished, key)), None)
    if yardstick is None:
        return None
    label = MEASURES[yardstick]
    bases = {name: results.named(results.run_of(name), "sft") for name in results.plain}
    points = [
        figures.Point(name, _gain(results, name, base, "score"), _gain(results, name, base, yardstick))
        for name, base in bases.items()
        if results.comparable("score", name, base)
    ]
    traces = traced(results)
    groups = []
    if len(points) > len(set(bases.values())):
        plane = figures.plane(points, name="gains", x="gain in reward over SFT", y=f"gain in {label} over SFT")
        left = [f"{name}: {many[2:-1]}." for name, base in bases.items() if (many := _few(results, name, base))]
        groups.append(Group("Both rewards of every arm", [plane], notes=left))
    if traces:
        paths = {
            f"{trace.arm}, {MEASURES[key]}": [
                figures.Point("", trace.mean("kl_from_sft", n), trace.mean(key, n)) for n in range(trace.points)
            ]
            for trace in traces
            for key in ("score", yardstick)
        }
        picture = figures.paths(
            paths,
            name="over-optimisation",
            x="KL from SFT (nats a completion)",
            y="reward",
            dashed=[path for path in paths if path.endswith(label)],
        )
        groups.append(Group("Along training", [picture], _table(results, traces, yardstick)))
    risen, told, fallen = _fallen(results, yardstick)
    if fallen:
        headings = ["arm", "seed", "gain in reward over SFT", "p", f"gain in {label} over SFT", "p"]
        headings += ["KL from SFT", "end rate"]
        notes = [
            "By their means, each at its own seed; intervals over its test prompts. Points of sweeps are among them. p "
            "corrected for all arms and seeds (Holm)."
        ]
        groups.append(Group(f"More reward, less {label}", table=Table(headings, fallen, notes)))
    if not groups:
        return None
    said = _opening(results, traces, yardstick, (risen, told, len(fallen)))
    return Section("over-optimisation", "Over-optimisation", said, groups)


def _fallen(results: Results, yardstick: str) -> tuple[int, int, list[list[str]]]:
    """At how many seeds of all arms the mean reward is above SFT's; a row for each at which the yardstick's is below.

    Between the two: of how many rows both are told apart from SFT's.
    """
    places = [
        (name, base, seed)
        for name in results.finished
        if name != (base := results.named(results.run_of(name), "sft"))
        for seed in results.comparable("score", name, base)
    ]
    gains = [
        estimated([(name, base, _difference(results, name, base, key, [seed])) for name, base, seed in places])
        for key in ("score", yardstick)
    ]
    risen, told, rows = 0, 0, []
    for (name, _, seed), reward, real in zip(places, *gains, strict=True):
        risen += reward.interval.mean > 0
        if reward.interval.mean > 0 > real.interval.mean:
            told += _rises_while_it_falls(reward, real)
            cells = [text for one in (reward, real) for text in (interval_text(one.interval), p_text(one.p))]
            kl, ended = (float(results.values(name, key, [seed]).mean()) for key in ("kl_from_sft", "ended"))
            rows.append([name, str(seed), *cells, f"{kl:.2f}", f"{ended:.0%}"])
    return risen, told, rows


def _rises_while_it_falls(reward: Difference, real: Difference) -> bool:
    return sign(reward.interval, reward.p) > 0 > sign(real.interval, real.p)


def _difference(
    results: Results, name: str, base: str, key: str, seeds: list[int]
) -> Float64[np.ndarray, "seeds prompts"]:
    return np.asarray(results.values(name, key, seeds) - results.values(base, key, seeds))


def _gain(results: Results, name: str, base: str, key: str) -> Interval:
    return crossed_interval(_difference(results, name, base, key, results.comparable("score", name, base)))


def _few(results: Results, name: str, base: str) -> str:
    return fewer(results, len(results.comparable("score", name, base)), name, base) if name != base else ""


def _table(results: Results, traces: list[Trace], yardstick: str) -> Table:
    rows = []
    for trace in traces:
        for point in range(trace.points):
            place = "start" if point == 0 else "end" if point == trace.points - 1 else f"snapshot {point}"
            cells = [interval_text(trace.mean(key, point)) for key in ("kl_from_sft", "score", yardstick)]
            name = trace.arm + fewer(results, len(trace.seeds), trace.arm)
            rows.append([name, place, f"{trace.sampled[point]:,.0f}", *cells])
    return Table(["arm", "point", "completions sampled", "KL from SFT", "reward", MEASURES[yardstick]], rows)


def _changes(traces: list[Trace], key: str, start: int) -> list[Difference]:
    """Of a column from a point to the end, paired by prompt; p corrected for the number of arms."""
    ends = [(trace.values(key, trace.points - 1), trace.values(key, start)) for trace in traces]
    return estimated([(trace.arm, trace.arm, end - way) for trace, (end, way) in zip(traces, ends, strict=True)])


def _opening(results: Results, traces: list[Trace], yardstick: str, counts: tuple[int, int, int]) -> str:
    label, (risen, told, fallen) = MEASURES[yardstick], counts
    said = f"At {fallen} of the {risen} arms and seeds whose mean reward is above SFT's, {label} is below SFT's"
    said += f", and {told} of them {'is' if told == 1 else 'are'} told apart from SFT in both" if fallen else ""
    if not traces:
        return f"{said}."
    changes = [_changes(traces, key, start) for start in (0, -2) for key in ("score", yardstick)]
    for trace, reward, real, late_reward, late in zip(traces, *changes, strict=True):
        texts = [interval_text(one.interval) for one in (reward, real, late_reward, late)]
        said += (
            f"; along PPO of {trace.arm}{fewer(results, len(trace.seeds), trace.arm)} the reward changes by {texts[0]} "
            f"and {label} by {texts[1]}, from the last snapshot to the end by {texts[2]} and {texts[3]}"
            f"{_hacked(late_reward, late, label)}"
        )
    longest = max((trace.seeds for trace in traces), key=len)
    return f"{said} (95% intervals {over(results, longest)})."


def _hacked(reward: Difference, real: Difference, label: str) -> str:
    """What both intervals hold, and p corrected for the number of arms."""
    if _rises_while_it_falls(reward, real):
        return f", so there the reward rises while {label} falls"
    if sign(reward.interval, reward.p) > 0 and sign(real.interval, real.p) > 0:
        return ", so both still rise"
    return ""
