"""What raw results say, for the terminal and for docs/benchmarks.md alike."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

UNITS = {"sampling": "tokens/s", "ppo": "episodes/s", "sft": "rows/s"}


@dataclass(frozen=True)
class Side:
    """Ours, or a peer in one of its settings."""

    name: str
    speed: float | None
    """Median; None if it failed."""
    memory: float | None
    """Median peak, MiB."""
    ratios: Sequence[float]
    """Ours over its speed, repetition by repetition; none for ours."""
    failed: str = ""
    losses: Sequence[float] = ()
    """Of the first three steps."""


def unit(result: dict[str, Any]) -> str:
    """What speeds are given in."""
    return UNITS.get(result["workload"]["kind"], "pairs/s")


def sides(result: dict[str, Any]) -> list[Side]:
    """Ours first, then every peer."""
    taken = result["taken"]
    ours = [_speed(result, one) for one in taken["mixpo"]]
    found = []
    for name, runs in taken.items():
        if name == "machine":
            continue
        speeds = [_speed(result, one) for one in runs]
        done = [speed for speed in speeds if speed is not None]
        if not done:
            found.append(Side(name, None, None, (), runs[0].get("failed", "")))
            continue
        ratios = [a / b for a, b in zip(ours, speeds, strict=True) if a is not None and b is not None]
        finished = [one for one in runs if "seconds" in one]
        memory = statistics.median(one["peak_memory_mib"] for one in finished)
        losses = [round(loss, 4) for loss in finished[0].get("losses", [])[:3]]
        found.append(Side(name, statistics.median(done), memory, () if name == "mixpo" else ratios, losses=losses))
    return found


def shares(result: dict[str, Any]) -> list[str]:
    """How near ours comes to what the machine can do, as measured in the same run."""
    ours = [one for one in result["taken"]["mixpo"] if "seconds" in one]
    machine = [one for one in result["taken"]["machine"] if "matmul_flops" in one]
    if not ours or not machine:
        return []
    rate, bandwidth = (statistics.median(one[key] for one in machine) for key in ("matmul_flops", "bandwidth"))
    if result["workload"]["kind"] in ("sft", "reward", "dpo"):
        share = result["counts"]["flops"] / statistics.median(one["seconds"] for one in ours) / rate
        return [f"{share:.0%} of the {rate / 1e9:,.0f} GFLOP/s of matrix products at the model's shapes"]
    if result["workload"]["kind"] == "sampling":
        share = statistics.median(one["read"] / (one["seconds"] - one["prefill_seconds"]) for one in ours) / bandwidth
        return [f"decoding reads what it must at {share:.0%} of the memory's {bandwidth / 1e9:,.1f} GB/s"]
    return []


def told(result: dict[str, Any]) -> str:
    """A workload's figures for the terminal."""
    lines = [f"{result['workload']['name']}, {unit(result)}, {result['workload']['precision']}"]
    for side in sides(result):
        if side.speed is None:
            lines.append(f"  {side.name:20s} failed: {side.failed[-200:]}")
        else:
            lines.append(f"  {side.name:20s} {side.speed:9.2f}  {side.memory:7,.0f} MiB  {side.losses}  {_ratio(side)}")
    return "\n".join([*lines, *(f"  {line}" for line in shares(result))])


def markdown(results: Iterable[dict[str, Any]]) -> str:
    """All workloads as one table: the peer's best setting counts."""
    lines = ["| work | ours | the peer's best | ratio | our memory | theirs | |", "|---|---|---|---|---|---|---|"]
    for result in results:
        ours, *peers = sides(result)
        done = [peer for peer in peers if peer.speed is not None]
        best = max(done, key=lambda peer: peer.speed or 0.0, default=None)
        failed = "; ".join(f"{peer.name} failed" for peer in peers if peer.speed is None)
        notes = "; ".join(filter(None, [*shares(result), failed]))
        name = f"{result['workload']['name']} ({result['workload']['precision']})"
        own = "failed" if ours.speed is None else f"{ours.speed:,.2f} {unit(result)}"
        theirs = "–" if best is None else f"{best.speed:,.2f} ({best.name})"
        ratio = "–" if best is None or not best.ratios else _ratio(best).removeprefix("ours/theirs ")
        memory = [f"{side.memory:,.0f} MiB" if side and side.memory is not None else "–" for side in (ours, best)]
        lines.append(f"| {name} | {own} | {theirs} | {ratio} | {memory[0]} | {memory[1]} | {notes} |")
    return "\n".join(lines)


def _ratio(side: Side) -> str:
    if not side.ratios:
        return ""
    return f"ours/theirs {statistics.median(side.ratios):.2f} ({min(side.ratios):.2f} to {max(side.ratios):.2f})"


def _speed(result: dict[str, Any], taken: dict[str, Any]) -> float | None:
    if "seconds" not in taken:
        return None
    return float(taken["tokens" if result["workload"]["kind"] == "sampling" else "rows"]) / float(taken["seconds"])
