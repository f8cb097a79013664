"""The commands: `python -m benchmarks prepare`, then `run` (ours and the peers in turn) and `grow` (ours alone)."""

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.growth import AXES
from benchmarks.workloads import CPU, GPU, PEERS, WORKLOADS, Workload

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ENVIRONMENTS = {
    "trl": ("trl==1.16.0", "transformers==5.23.0"),
    "trl-ppo": ("trl==1.9.2", "transformers==5.23.0"),
}
"""What is installed for a peer; sampling runs in the first one's environment."""
WORKERS = {"trl": ("trl", "benchmarks.peers.trl"), "trl-ppo": ("trl-ppo", "benchmarks.peers.trl_ppo")}
"""Environment and module of a peer; the others are settings of `generate`."""

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
Work = Annotated[Path, typer.Option(help="Where models, rows and the peers' environments are kept.")]
Names = Annotated[
    list[str] | None, typer.Argument(help=f"Of {', '.join(WORKLOADS)}; all of this machine's if none is named.")
]


@app.command()
def prepare(
    names: Names = None, rows: str = "hub:Anthropic/hh-rlhf@helpful-base", work: Work = Path(".benchmarks")
) -> None:
    """Make models and rows, and install the peers. `--rows` is a file of HH-RLHF, or hub:NAME@FOLDER."""
    from benchmarks.inputs import prepare_model, prepare_rows

    for workload in _chosen(names):
        prepare_model(workload.model, work / "inputs")
        prepare_rows(workload, work / "inputs", rows)
    for name, packages in ENVIRONMENTS.items():
        if not (work / name).exists():
            subprocess.run([sys.executable, "-m", "venv", work / name], check=True)
            pip = [work / name / "bin" / "pip", "install", "--quiet"]
            subprocess.run([*pip, f"torch=={_version('torch')}"], check=True)
            subprocess.run([*pip, *packages], check=True)


@app.command()
def run(names: Names = None, repeats: int = 3, ours_only: bool = False, work: Work = Path(".benchmarks")) -> None:
    """Run ours and every peer in turn, `repeats` times; print medians and ratios, save the raw figures."""
    for workload in _chosen(names):
        taken: dict[str, list[dict[str, Any]]] = {}
        spec = workload.spec(str((work / "inputs").resolve()))
        for _ in range(repeats):
            taken.setdefault("machine", []).append(_machine(spec))
            taken.setdefault("mixpo", []).append(_worker([sys.executable, "-m", "benchmarks.ours"], spec))
            for peer, settings in ({} if ours_only else PEERS[workload.kind]).items():
                environment, module = WORKERS.get(peer.split()[0], ("trl", "benchmarks.peers.generate"))
                python = str(work.absolute() / environment / "bin" / "python")
                found = _worker([python, "-m", module], {**spec, "settings": settings})
                taken.setdefault(peer, []).append(found)
        counts = json.loads((work / "inputs" / "rows" / workload.name / "counts.json").read_text(encoding="utf8"))
        result = {
            "workload": spec | {"inputs": None},
            "counts": counts,
            "taken": taken,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "when": datetime.now(UTC).date().isoformat(),
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{workload.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
        _tell(workload, result)


@app.command()
def grow(
    axes: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(AXES)}; all if none is named.")] = None,
) -> None:
    """Measure how time and memory grow with lengths, batch, vocabulary, completions a prompt and model size."""
    from benchmarks.draw import growth

    for axis in axes or ():
        if axis not in AXES:
            raise typer.BadParameter(f"found {axis!r}; expected of {', '.join(AXES)}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "growth.json"
    found: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(path.read_text()) if path.exists() else {}
    for axis in axes or AXES:
        found[axis] = {kind: [] for kind in ("update", "sampling")}
        for kind, points in found[axis].items():
            for point in AXES[axis]:
                spec = {"kind": kind, "point": asdict(point)}
                points.append(_worker([sys.executable, "-m", "benchmarks.growth"], spec))
                print(f"{axis:12s} {kind:10s} {asdict(point)[axis]:8,d}  {_point(points[-1], points[0])}", flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    whole = {axis: kinds for axis, kinds in found.items() if all("seconds" in p for ps in kinds.values() for p in ps)}
    if not whole:
        raise SystemExit("no axis was measured at all its points; nothing is drawn")
    growth(whole, "seconds", "seconds", RESULTS / "growth-seconds.svg")
    growth(whole, "peak_memory_mib", "peak memory, MiB", RESULTS / "growth-memory.svg")


def _point(point: dict[str, Any], first: dict[str, Any]) -> str:
    if "failed" in point:
        return f"failed: {point['failed'][-200:]}"
    if "failed" in first:
        return f"{point['seconds']:8.3f} s  {point['peak_memory_mib']:7,.0f} MiB"
    against = point["seconds"] / first["seconds"] / (point["flops"] / first["flops"])
    return f"{point['seconds']:8.3f} s  {point['peak_memory_mib']:7,.0f} MiB  {against:.2f} of the FLOPs' growth"


def _tell(workload: Workload, result: dict[str, Any]) -> None:
    taken = result["taken"]
    unit = "tokens/s" if workload.kind == "sampling" else "rows/s"
    print(f"{workload.name}, {unit}")
    speeds = {
        name: [_speed(workload, one) for one in runs if "seconds" in one]
        for name, runs in taken.items()
        if name != "machine"
    }
    for name, each in speeds.items():
        if not each:
            print(f"  {name:20s} failed: {taken[name][0].get('failed', '')[-200:]}")
            continue
        memory = statistics.median(one["peak_memory_mib"] for one in taken[name] if "seconds" in one)
        losses = [round(loss, 4) for loss in taken[name][0].get("losses", [])[:3]]
        ratio = ""
        if name != "mixpo" and speeds["mixpo"]:
            ratios = [ours / theirs for ours, theirs in zip(speeds["mixpo"], each, strict=False)]
            ratio = f"ours/theirs {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {name:20s} {statistics.median(each):9.2f}  {memory:7,.0f} MiB  {losses}  {ratio}")
    if workload.kind in ("sft", "reward", "dpo"):
        rate = statistics.median(one["matmul_flops"] for one in taken["machine"])
        seconds = statistics.median(one["seconds"] for one in taken["mixpo"])
        share = result["counts"]["flops"] / seconds / rate
        print(f"  {share:.0%} of the {rate / 1e9:,.0f} GFLOP/s of matrix products at the model's shapes")


def _speed(workload: Workload, taken: dict[str, Any]) -> float:
    return float(taken["tokens" if workload.kind == "sampling" else "rows"]) / float(taken["seconds"])


def _machine(spec: dict[str, Any]) -> dict[str, Any]:
    return _worker([sys.executable, "-m", "benchmarks.machine"], spec)


def _worker(command: list[str], spec: dict[str, Any]) -> dict[str, Any]:
    """What a worker process prints as its last line; why it failed, if it did."""
    done = subprocess.run([*command, json.dumps(spec)], cwd=HERE.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _chosen(names: list[str] | None) -> list[Workload]:
    for name in names or ():
        if name not in WORKLOADS:
            raise typer.BadParameter(f"found {name!r}; expected of {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in names or (GPU if torch.cuda.is_available() else CPU)]


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    app()
