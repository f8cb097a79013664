"""Command line of the benchmarks: `prepare`, `run` (mixpo and peers), `grow` and `memory` (mixpo alone), `table`."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.growth import AXES
from benchmarks.memory import MICROBATCH_TOKENS, list_cases
from benchmarks.memory import format_table as format_memory_table
from benchmarks.tables import format_result, format_table
from benchmarks.workloads import CPU, GPU, PEERS, WORKLOADS, Workload

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ENVIRONMENTS = {
    "trl": ("trl==1.16.0", "transformers==5.23.0"),
    "trl-ppo": ("trl==1.9.2", "transformers==5.23.0"),
}
"""Packages of each peer's environment; sampling peers run in the first."""
WORKERS = {"trl": ("trl", "benchmarks.peers.trl"), "trl-ppo": ("trl-ppo", "benchmarks.peers.trl_ppo")}
"""Environment and module of a peer; all others are settings of `generate`."""

MALLOC_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}
"""glibc settings that keep freed memory, for the peers too: mixpo sets them itself; saves up to half the time."""
PRECISIONS = ("float32", "bfloat16")
TIMEOUT_SECONDS = 1800
"""Timeout of a worker, seconds."""

Precision = Annotated[
    str | None, typer.Option(help="float32 on a CPU without matrix units for bfloat16; on every side.")
]

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
Work = Annotated[Path, typer.Option(help="Folder of models, rows and the peers' environments.")]
Names = Annotated[
    list[str] | None, typer.Argument(help=f"Of {', '.join(WORKLOADS)}; all of this machine's if none is named.")
]


@app.command()
def prepare(
    names: Names = None, rows: str = "hub:Anthropic/hh-rlhf@helpful-base", work: Work = Path(".benchmarks")
) -> None:
    """Make models and rows, and install the peers. `--rows` is an HH-RLHF file, or hub:NAME@FOLDER."""
    from benchmarks.inputs import prepare_model, prepare_rows

    for workload in _select_workloads(names):
        prepare_model(workload.model, work / "inputs")
        prepare_rows(workload, work / "inputs", rows)
    for name, packages in ENVIRONMENTS.items():
        if not (work / name).exists():
            subprocess.run([sys.executable, "-m", "venv", work / name], check=True)
            pip = [work / name / "bin" / "pip", "install", "--quiet"]
            subprocess.run([*pip, f"torch=={_read_version('torch')}"], check=True)
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
    """Run mixpo and every peer in turn, `repeats` times; print medians and ratios, and save the measurements."""
    for workload in _select_workloads(names):
        workload = replace(workload, **_precision_field(precision))
        measurements: dict[str, list[dict[str, Any]]] = {}
        spec = workload.spec(str((work / "inputs").resolve()))
        for _ in range(repeats):
            measurements.setdefault("machine", []).append(_measure_machine(spec))
            measurements.setdefault("mixpo", []).append(run_in_worker([sys.executable, "-m", "benchmarks.ours"], spec))
            for peer, settings in ({} if ours_only else PEERS[workload.kind]).items():
                if settings.get("dtype") == workload.precision:
                    continue  # the same as without this setting
                environment, module = WORKERS.get(peer.split()[0], ("trl", "benchmarks.peers.generate"))
                python = str(work.absolute() / environment / "bin" / "python")
                measurement = run_in_worker([python, "-m", module], {**spec, "settings": settings})
                measurements.setdefault(peer, []).append(measurement)
        counts = json.loads((work / "inputs" / "rows" / workload.name / "counts.json").read_text(encoding="utf8"))
        result = {"workload": spec | {"inputs": None}, "counts": counts, "taken": measurements}
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{workload.name}.{workload.precision}.json"
        if more and path.exists():
            result = _merge_results(json.loads(path.read_text(encoding="utf8")), result)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
        print(format_result(result), flush=True)


@app.command()
def table() -> None:
    """Print all saved results as the table of docs/benchmarks.md."""
    files = [RESULTS / f"{name}.{precision}.json" for name in WORKLOADS for precision in PRECISIONS]
    print(format_table(json.loads(file.read_text(encoding="utf8")) for file in files if file.exists()))


@app.command()
def grow(
    axes: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(AXES)}; all if none is named.")] = None,
    precision: Precision = None,
) -> None:
    """Measure how time and memory grow with lengths, batch, vocabulary, completions a prompt and model size."""
    from benchmarks.draw import draw_growth

    for axis in axes or ():
        if axis not in AXES:
            raise typer.BadParameter(f"found {axis!r}; expected of {', '.join(AXES)}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "growth.json"
    results: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(path.read_text()) if path.exists() else {}
    for axis in axes or AXES:
        results[axis] = {kind: [] for kind in ("update", "sampling")}
        for kind, points in results[axis].items():
            for point in AXES[axis]:
                spec = {"kind": kind, "point": asdict(point) | _precision_field(precision)}
                points.append(run_in_worker([sys.executable, "-m", "benchmarks.growth"], spec))
                print(
                    f"{axis:12s} {kind:10s} {asdict(point)[axis]:8,d}  {_format_point(points[-1], points[0])}",
                    flush=True,
                )
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    complete = {
        axis: kinds for axis, kinds in results.items() if all("seconds" in p for ps in kinds.values() for p in ps)
    }
    if not complete:
        raise SystemExit("grow: found no axis with a measurement at every point; nothing to draw")
    draw_growth(complete, "seconds", "seconds", RESULTS / "growth-seconds.svg")
    draw_growth(complete, "peak_memory_mib", "peak memory, MiB", RESULTS / "growth-memory.svg")


@app.command()
def memory(
    models: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(MICROBATCH_TOKENS)}.")] = None,
    way: Annotated[list[str], typer.Option(help="whole or lora; may be given twice.")] = ["whole", "lora"],  # noqa: B006
    precision: Annotated[list[str], typer.Option(help="May be given twice.")] = list(PRECISIONS),  # noqa: B006
    work: Work = Path(".benchmarks"),
) -> None:
    """Compute the stages of small models, each in a process of its own; print their peak memory beside its plan."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "memory.json"
    saved: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf8")) if path.exists() else []
    for case in list_cases(models or list(MICROBATCH_TOKENS), way, precision):
        folder = (work / "memory" / f"{case.model}-{case.lora}-{case.precision}").resolve()
        spec = {"case": asdict(case), "work": str(folder)}
        result = run_in_worker([sys.executable, "-m", "benchmarks.memory"], spec, environment={})
        if "failed" in result:
            print(f"{case}: failed: {result['failed']}", flush=True)
        elif "moment" in result:
            saved = [one for one in saved if any(one[key] != result[key] for key in asdict(case))] + [result]
            path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf8")
    print(format_memory_table(saved))


def _merge_results(saved: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Append new repetitions to saved ones. Raises SystemExit if they are not of the same work."""
    before, now = ({**result, "sides": sorted(result["taken"]), "taken": None, "when": None} for result in (saved, new))
    if differing := [name for name in now if before.get(name) != now[name]]:
        name = differing[0]
        raise SystemExit(
            f"--more: found saved repetitions with {name} {before.get(name)}; expected {now[name]}; leave it out"
        )
    return new | {"taken": {side: [*saved["taken"].get(side, []), *runs] for side, runs in new["taken"].items()}}


def _precision_field(precision: str | None) -> dict[str, str]:
    """Return the precision as a field to override, if it is set. Raises on an unknown one."""
    if precision not in (None, *PRECISIONS):
        raise typer.BadParameter(f"found {precision!r}; expected of {', '.join(PRECISIONS)}")
    return {} if precision is None else {"precision": precision}


def _format_point(point: dict[str, Any], first: dict[str, Any]) -> str:
    """Format time, memory and growth relative to FLOPs of one point of an axis."""
    if "failed" in point:
        return f"failed: {point['failed'][-200:]}"
    if "failed" in first:
        return f"{point['seconds']:8.3f} s  {point['peak_memory_mib']:7,.0f} MiB"
    growth = point["seconds"] / first["seconds"] / (point["flops"] / first["flops"])
    return f"{point['seconds']:8.3f} s  {point['peak_memory_mib']:7,.0f} MiB  {growth:.2f} of the FLOPs' growth"


def _measure_machine(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure FLOP/s and bandwidth of this machine in a worker."""
    return run_in_worker([sys.executable, "-m", "benchmarks.machine"], spec)


def run_in_worker(
    command: list[str],
    spec: dict[str, Any],
    timeout: float = TIMEOUT_SECONDS,
    environment: Mapping[str, str] = MALLOC_ENVIRONMENT,
) -> dict[str, Any]:
    """Run a worker process and return the JSON of its last line; `failed` with the error if it failed."""
    try:
        done = subprocess.run(
            [*command, json.dumps(spec)],
            cwd=HERE.parent,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"timeout after {timeout:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _select_workloads(names: list[str] | None) -> list[Workload]:
    """Select workloads by name, or all of this machine's."""
    for name in names or ():
        if name not in WORKLOADS:
            raise typer.BadParameter(f"found {name!r}; expected of {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in names or (GPU if torch.cuda.is_available() else CPU)]


def _read_version(package: str) -> str:
    """Version of an installed package."""
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    app()
