"""Tables of results for the terminal and for docs/benchmarks.md."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

UNITS = {"sampling": "tokens/s", "ppo": "episodes/s", "sft": "rows/s"}


@dataclass(frozen=True)
class Side:
    """Results of mixpo, or of a peer in one of its settings."""

    name: str
    speed: float | None
    """Median; None if all runs failed."""
    memory: float | None
    """Median peak, MiB."""
    ratios: Sequence[float]
    """Speed of mixpo over this speed in each repetition; empty for mixpo."""
    failed: str = ""
    losses: Sequence[float] = ()
    """Losses of the first three steps."""


def speed_unit(result: dict[str, Any]) -> str:
    """Unit of a result's speeds."""
    return UNITS.get(result["workload"]["kind"], "pairs/s")


def summarize_sides(result: dict[str, Any]) -> list[Side]:
    """Compute median speed, memory and ratios of mixpo, first, and of every peer."""
    ours = [_compute_speed(result, run) for run in result["taken"]["mixpo"]]
    sides = []
    for name, runs in result["taken"].items():
        if name == "machine":
            continue
        speeds = [_compute_speed(result, run) for run in runs]
        done = [speed for speed in speeds if speed is not None]
        if not done:
            sides.append(Side(name, None, None, (), runs[0].get("failed", "")))
            continue
        ratios = [a / b for a, b in zip(ours, speeds, strict=True) if a is not None and b is not None]
        finished = [run for run in runs if "seconds" in run]
        memory = statistics.median(run["peak_memory_mib"] for run in finished)
        losses = [round(loss, 4) for loss in finished[0].get("losses", [])[:3]]
        sides.append(Side(name, statistics.median(done), memory, () if name == "mixpo" else ratios, losses=losses))
    return sides


def describe_utilization(result: dict[str, Any]) -> list[str]:
    """Describe mixpo's share of the machine's FLOP/s or memory bandwidth, measured in the same run."""
    ours = [run for run in result["taken"]["mixpo"] if "seconds" in run]
    machine = [run for run in result["taken"]["machine"] if "matmul_flops" in run]
    if not ours or not machine:
        return []
    rate, bandwidth = (statistics.median(run[key] for run in machine) for key in ("matmul_flops", "bandwidth"))
    if result["workload"]["kind"] in ("sft", "reward", "dpo"):
        share = result["counts"]["flops"] / statistics.median(run["seconds"] for run in ours) / rate
        return [f"{share:.0%} of the {rate / 1e9:,.0f} GFLOP/s of matrix products at the model's shapes"]
    if result["workload"]["kind"] == "sampling":
        share = statistics.median(run["read"] / (run["seconds"] - run["prefill_seconds"]) for run in ours) / bandwidth
        return [f"decoding at {share:.0%} of the memory bandwidth of {bandwidth / 1e9:,.1f} GB/s"]
    return []


def format_result(result: dict[str, Any]) -> str:
    """Format the result of one workload for the terminal."""
    lines = [f"{result['workload']['name']}, {speed_unit(result)}, {result['workload']['precision']}"]
    for side in summarize_sides(result):
        if side.speed is None:
            lines.append(f"  {side.name:20s} failed: {side.failed[-200:]}")
        else:
            lines.append(
                f"  {side.name:20s} {side.speed:9.2f}  {side.memory:7,.0f} MiB  {side.losses}  {_format_ratio(side)}"
            )
    return "\n".join([*lines, *(f"  {line}" for line in describe_utilization(result))])


def format_table(results: Iterable[dict[str, Any]]) -> str:
    """Format all workloads as one Markdown table, with the fastest setting of each peer."""
    lines = ["| work | ours | the peer's best | ratio | our memory | theirs | |", "|---|---|---|---|---|---|---|"]
    for result in results:
        ours, *peers = summarize_sides(result)
        done = [peer for peer in peers if peer.speed is not None]
        best = max(done, key=lambda peer: peer.speed or 0.0, default=None)
        failed = "; ".join(f"{peer.name} failed" for peer in peers if peer.speed is None)
        notes = "; ".join(filter(None, [*describe_utilization(result), failed]))
        name = f"{result['workload']['name']} ({result['workload']['precision']})"
        own = "failed" if ours.speed is None else f"{ours.speed:,.2f} {speed_unit(result)}"
        theirs = "–" if best is None else f"{best.speed:,.2f} ({best.name})"
        ratio = "–" if best is None or not best.ratios else _format_ratio(best).removeprefix("ours/theirs ")
        memory = [f"{side.memory:,.0f} MiB" if side and side.memory is not None else "–" for side in (ours, best)]
        lines.append(f"| {name} | {own} | {theirs} | {ratio} | {memory[0]} | {memory[1]} | {notes} |")
    return "\n".join(lines)


def _format_ratio(side: Side) -> str:
    """Format the median and range of the speed ratios; empty without ratios."""
    if not side.ratios:
        return ""
    return f"ours/theirs {statistics.median(side.ratios):.2f} ({min(side.ratios):.2f} to {max(side.ratios):.2f})"


def _compute_speed(result: dict[str, Any], run: dict[str, Any]) -> float | None:
    """Rows, or tokens of sampling, a second; None if the run failed."""
    if "seconds" not in run:
        return None
    return float(run["tokens" if result["workload"]["kind"] == "sampling" else "rows"]) / float(run["seconds"])
