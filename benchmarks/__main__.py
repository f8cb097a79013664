"""The commands: `python -m benchmarks prepare`; `run`, ours and the peers in turn; `grow`, ours alone; `table`."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.growth import AXES
from benchmarks.tables import markdown, told
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

KEEP = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}
"""The C library keeps what is freed, for the peers too: mixpo sets it itself, and it is worth up to half their time."""
PRECISIONS = ("float32", "bfloat16")
LIMIT = 1800
"""Seconds after which a worker has failed."""

Precision = Annotated[
    str | None, typer.Option(help="float32 on a CPU without matrix units for bfloat16; on every side.")
]

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
def run(
    names: Names = None,
    repeats: int = 3,
    ours_only: bool = False,
    precision: Precision = None,
    more: Annotated[bool, typer.Option("--more", help="Add to the saved repetitions of the same work.")] = False,
    work: Work = Path(".benchmarks"),
) -> None:
    """Run ours and every peer in turn, `repeats` times; print medians and ratios, save the raw figures."""
    for workload in _chosen(names):
        workload = replace(workload, **_given(precision))
        taken: dict[str, list[dict[str, Any]]] = {}
        spec = workload.spec(str((work / "inputs").resolve()))
        for _ in range(repeats):
            taken.setdefault("machine", []).append(_machine(spec))
            taken.setdefault("mixpo", []).append(_worker([sys.executable, "-m", "benchmarks.ours"], spec))
            for peer, settings in ({} if ours_only else PEERS[workload.kind]).items():
                if settings.get("dtype") == workload.precision:
                    continue  # what the peer does without it
                environment, module = WORKERS.get(peer.split()[0], ("trl", "benchmarks.peers.generate"))
                python = str(work.absolute() / environment / "bin" / "python")
                found = _worker([python, "-m", module], {**spec, "settings": settings})
                taken.setdefault(peer, []).append(found)
        counts = json.loads((work / "inputs" / "rows" / workload.name / "counts.json").read_text(encoding="utf8"))
        result = {"workload": spec | {"inputs": None}, "counts": counts, "taken": taken}
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{workload.name}.{workload.precision}.json"
        if more and path.exists():
            result = _added(json.loads(path.read_text(encoding="utf8")), result)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
        print(told(result), flush=True)


@app.command()
def table() -> None:
    """Print all saved results as the table of docs/benchmarks.md."""
    files = [RESULTS / f"{name}.{precision}.json" for name in WORKLOADS for precision in PRECISIONS]
    print(markdown(json.loads(file.read_text(encoding="utf8")) for file in files if file.exists()))


@app.command()
def grow(
    axes: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(AXES)}; all if none is named.")] = None,
    precision: Precision = None,
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
                spec = {"kind": kind, "point": asdict(point) | _given(precision)}
                points.append(_worker([sys.executable, "-m", "benchmarks.growth"], spec))
                print(f"{axis:12s} {kind:10s} {asdict(point)[axis]:8,d}  {_point(points[-1], points[0])}", flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    whole = {axis: kinds for axis, kinds in found.items() if all("seconds" in p for ps in kinds.values() for p in ps)}
    if not whole:
        raise SystemExit("no axis was measured at all its points; nothing is drawn")
    growth(whole, "seconds", "seconds", RESULTS / "growth-seconds.svg")
    growth(whole, "peak_memory_mib", "peak memory, MiB", RESULTS / "growth-memory.svg")


def _added(saved: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Repetitions behind those that were saved. Raises where these are of other work or of another machine."""
    alike = [{**one, "sides": sorted(one["taken"]), "taken": None, "when": None} for one in (saved, new)]
    if other := [name for name in alike[1] if alike[0].get(name) != alike[1][name]]:
        found, expected = (one.get(other[0]) for one in alike)
        raise SystemExit(f"--more: found saved repetitions with {other[0]} {found}; expected {expected}; leave it out")
    return new | {"taken": {who: [*saved["taken"].get(who, []), *found] for who, found in new["taken"].items()}}


def _given(precision: str | None) -> dict[str, str]:
    if precision not in (None, *PRECISIONS):
        raise typer.BadParameter(f"found {precision!r}; expected of {', '.join(PRECISIONS)}")
    return {} if precision is None else {"precision": precision}


def _point(point: dict[str, Any], first: dict[str, Any]) -> str:
    if "failed" in point:
        return f"failed: {point['failed'][-200:]}"
    if "failed" in first:
        return f"{point['seconds']:8.3f} s  {point['peak_memory_mib']:7,.0f} MiB"
    against = point["seconds"] / first["seconds"] / (point["flops"] / first["flops"])
    return f"{point['seconds']:8.3f} s  {point['peak_memory_mib']:7,.0f} MiB  {against:.2f} of the FLOPs' growth"


def _machine(spec: dict[str, Any]) -> dict[str, Any]:
    return _worker([sys.executable, "-m", "benchmarks.machine"], spec)


def _worker(command: list[str], spec: dict[str, Any]) -> dict[str, Any]:
    """What a worker process prints as its last line; why it failed, if it did."""
    try:
        done = subprocess.run(
            [*command, json.dumps(spec)],
            cwd=HERE.parent,
            env={**os.environ, **KEEP},
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {LIMIT} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
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
