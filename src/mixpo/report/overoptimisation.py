"""Is it real or hacked? The reward that was optimised against one that was not, along training (Gao et al. 2022)."""

from mixpo.algorithms.statistics import Interval, crossed_interval
from mixpo.experiments.results import MEASURES, Results
from mixpo.report import figures
from mixpo.report.comparison import fewer, interval_text, over
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
    risen, fallen = _fallen(results, yardstick)
    if fallen:
        headings = ["arm", "seed", "gain in reward over SFT", f"gain in {label} over SFT", "KL from SFT", "end rate"]
        notes = ["Each at its own seed; intervals over its test prompts. Points of sweeps are among them."]
        groups.append(Group(f"More reward, less {label}", table=Table(headings, fallen, notes)))
    if not groups:
        return None
    return Section(
        "over-optimisation", "Over-optimisation", _opening(results, traces, yardstick, risen, len(fallen)), groups
    )


def _fallen(results: Results, yardstick: str) -> tuple[int, list[list[str]]]:
    """At how many seeds of all arms the reward rises over SFT, and a row for each at which the yardstick falls."""
    risen, rows = 0, []
    for name in results.finished:
        base = results.named(results.run_of(name), "sft")
        if name == base:
            continue
        for seed in results.comparable("score", name, base):
            reward, real = (
                crossed_interval(results.values(name, key, [seed]) - results.values(base, key, [seed]))
                for key in ("score", yardstick)
            )
            risen += reward.mean > 0
            if reward.mean > 0 > real.mean:
                kl, ended = (float(results.values(name, key, [seed]).mean()) for key in ("kl_from_sft", "ended"))
                rows.append([name, str(seed), interval_text(reward), interval_text(real), f"{kl:.2f}", f"{ended:.0%}"])
    return risen, rows


def _gain(results: Results, name: str, base: str, key: str) -> Interval:
    seeds = results.comparable("score", name, base)
    return crossed_interval(results.values(name, key, seeds) - results.values(base, key, seeds))


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


def _change(trace: Trace, key: str, start: int) -> Interval:
    """Of a column from a point to the end, paired by prompt."""
    return crossed_interval(trace.values(key, trace.points - 1) - trace.values(key, start))


def _opening(results: Results, traces: list[Trace], yardstick: str, risen: int, fallen: int) -> str:
    label = MEASURES[yardstick]
    said = f"At {fallen} of the {risen} arms and seeds whose reward rises over SFT's, {label} falls below SFT's"
    if not traces:
        return f"{said}."
    for trace in traces:
        reward, real = (_change(trace, key, 0) for key in ("score", yardstick))
        late_reward, late = (_change(trace, key, trace.points - 2) for key in ("score", yardstick))
        said += (
            f"; along PPO of {trace.arm}{fewer(results, len(trace.seeds), trace.arm)} the reward changes by "
            f"{interval_text(reward)} and {label} by {interval_text(real)}, from the last snapshot to the end by "
            f"{interval_text(late_reward)} and {interval_text(late)}{_hacked(late_reward, late, label)}"
        )
    longest = max((trace.seeds for trace in traces), key=len)
    return f"{said} (95% intervals {over(results, longest)})."


def _hacked(reward: Interval, real: Interval, label: str) -> str:
    if reward.low > 0 and real.high < 0:
        return f", so there the reward rises while {label} falls"
    if reward.low > 0 and real.low > 0:
        return ", so both still rise"
    return ""
