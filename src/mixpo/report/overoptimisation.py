"""Is it real or hacked? The reward that was optimised against one that was not, along training (Gao et al. 2022)."""

from mixpo.algorithms.statistics import Interval, crossed_interval
from mixpo.report import figures
from mixpo.report.comparison import interval_text, over
from mixpo.report.document import Group, Section, Table
from mixpo.report.results import MEASURES, Results
from mixpo.report.traces import Trace, traced


def section(results: Results) -> Section | None:
    """Gains over SFT in both rewards, of every arm and along training."""
    yardstick = next((key for key in ("true_reward", "second_score") if results.has(results.finished, key)), None)
    if yardstick is None or "sft" not in results.plain:
        return None
    label = MEASURES[yardstick]
    arms = [name for name in results.plain if name != "sft" and results.common_seeds(name, "sft")]
    points = [figures.Point(name, _gain(results, name, "score"), _gain(results, name, yardstick)) for name in arms]
    plane = figures.plane(points, name="gains", x="gain in reward over SFT", y=f"gain in {label} over SFT")
    groups = [Group("Both rewards of every arm", [plane])]
    traces = traced(results)
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
        groups.append(Group("Along training", [picture], _table(traces, yardstick)))
    return Section("over-optimisation", "Over-optimisation", _opening(results, traces, yardstick), groups)


def _gain(results: Results, name: str, key: str) -> Interval:
    seeds = results.common_seeds(name, "sft")
    return crossed_interval(results.values(name, key, seeds) - results.values("sft", key, seeds))


def _table(traces: list[Trace], yardstick: str) -> Table:
    rows = []
    for trace in traces:
        for point in range(trace.points):
            place = "start" if point == 0 else "end" if point == trace.points - 1 else f"snapshot {point}"
            cells = [interval_text(trace.mean(key, point)) for key in ("kl_from_sft", "score", yardstick)]
            rows.append([trace.arm, place, f"{trace.sampled[point]:,.0f}", *cells])
    return Table(["arm", "point", "completions sampled", "KL from SFT", "reward", MEASURES[yardstick]], rows)


def _change(trace: Trace, key: str, start: int) -> Interval:
    """Of a column from a point to the end, paired by prompt."""
    return crossed_interval(trace.values(key, trace.points - 1) - trace.values(key, start))


def _opening(results: Results, traces: list[Trace], yardstick: str) -> str:
    label = MEASURES[yardstick]
    if not traces:
        return (
            f"Every arm's gain over SFT in the reward that was optimised stands against its gain in {label}, for which "
            "nothing was optimised."
        )
    said = []
    for trace in traces:
        reward, real = (_change(trace, key, 0) for key in ("score", yardstick))
        late_reward, late = (_change(trace, key, trace.points - 2) for key in ("score", yardstick))
        said.append(
            f"along PPO of {trace.arm} the reward changes by {interval_text(reward)} and {label} by "
            f"{interval_text(real)}, from the last snapshot to the end by {interval_text(late_reward)} and "
            f"{interval_text(late)}{_hacked(late_reward, late)}"
        )
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]} ({over(results, traces[0].seeds)})."


def _hacked(reward: Interval, real: Interval) -> str:
    if reward.low > 0 and real.high < 0:
        return ", so there the reward rises while what it stands for falls"
    if reward.low > 0 and real.low > 0:
        return ", so both still rise"
    return ""
