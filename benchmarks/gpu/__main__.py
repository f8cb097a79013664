"""Command of one part: `python -m benchmarks.gpu PART [--tiny]`. Figures are saved after every workload."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.__main__ import RESULTS, run_in_worker
from benchmarks.gpu.right import CHAIN, check_all
from benchmarks.inputs import prepare_model, prepare_rows
from benchmarks.plans import ChainPlanner
from benchmarks.worker import describe_environment
from benchmarks.workloads import CPU, GPU, SEVEN, Workload

CARRIED = Path(".gpu")
"""Folder of what `pack.sh` gathered."""
PART_SECONDS = 280
"""Time of a part; what does not fit is left out and said so."""
GOALS = {
    "gpu-dpo-7b": ("share of the product rate", 0.45),
    "gpu-sampling-7b": ("share of the bandwidth", 0.7),
    "gpu-sampling-7b-graphs": ("share of the bandwidth", 0.7),
    "gpu-ppo-7b": ("peak GB", 40.0),
}
"""What is aimed at: at least such a share, at most so much memory."""
PEERS = ("gpu-dpo-135m", "gpu-sampling-135m", "gpu-dpo-1b", "gpu-sampling-1b", "gpu-reward-1b")
PEER_MODULES = {"sampling": "benchmarks.peers.generate"}

TINY_MODEL = "2m"

app = typer.Typer(add_completion=False)


class BenchmarkPartResults:
    """The figures of a part: each is printed and saved when it is there."""

    def __init__(self, part: str, seconds: float = PART_SECONDS, earlier: Path | None = None) -> None:
        """`earlier` is a file of figures of the same part, which stand and are not measured again."""
        self.path = Path(os.environ.get("OUT", RESULTS)) / f"gpu-{part}.json"
        self.ends = time.monotonic() + seconds
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        environment = describe_environment()
        if environment["commit"] is None and (CARRIED / "commit").exists():
            environment["commit"] = (CARRIED / "commit").read_text(encoding="utf8").strip()
        self.content: dict[str, Any] = {"card": card, **environment, "figures": {}}
        self.copy = earlier
        if earlier is not None and earlier.exists():
            figures = json.loads(earlier.read_text(encoding="utf8"))["figures"]
            self.content["figures"] = {name: value for name, value in figures.items() if "failed" not in value}

    @property
    def seconds_left(self) -> float:
        """Time until the part must end."""
        return self.ends - time.monotonic()

    def save(self, name: str, figures: dict[str, Any]) -> None:
        """Print a workload's figures, and write them with those before."""
        print(f"{name}: {json.dumps(figures)}", flush=True)
        self.content["figures"][name] = figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf8")
        if self.copy is not None:
            shutil.copy(self.path, self.copy)


@app.command()
def measure_part(
    part: str,
    tiny: Annotated[bool, typer.Option(help="At sizes for a CPU, to try the part.")] = False,
    work: Annotated[Path | None, typer.Option(help="Folder that is kept, in which another call goes on.")] = None,
) -> None:
    """Measure one part: right, seven, peers or hh."""
    parts: dict[str, Callable[[BenchmarkPartResults, Path, bool], None]] = {
        "right": check_correctness,
        "seven": measure_7b,
        "peers": measure_peers,
        "hh": run_hh,
    }
    if part not in parts:
        raise typer.BadParameter(f"found {part!r}; expected of {', '.join(parts)}")
    seconds = 3600 if tiny else PART_SECONDS
    name = f"{part}-tiny" if tiny else part
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if work is None else work / name
        folder.mkdir(parents=True, exist_ok=True)
        results = BenchmarkPartResults(name, seconds, None if work is None else folder / "figures.json")
        try:
            parts[part](results, folder, tiny)
        except Exception:
            results.save("failed", {"failed": traceback.format_exc()[-3000:]})
            raise


def check_correctness(results: BenchmarkPartResults, work: Path, tiny: bool) -> None:
    """Compare what the GPU computes with the CPU. Exits with 1 if anything is not right."""
    inputs, chain = work / "inputs", [_shrink(workload) for workload in CHAIN] if tiny else CHAIN
    _prepare(chain, inputs)
    check_all(chain, inputs, work, results.save)
    wrong = [
        f"{name}: {check}"
        for name, checks in results.content["figures"].items()
        for check, figures in checks.items()
        if not figures["right"]
    ]
    results.save("summary", {"wrong": wrong})
    if wrong:
        raise SystemExit(1)


def measure_7b(results: BenchmarkPartResults, work: Path, tiny: bool) -> None:
    """Peaks and speed of LoRA at 7B, from random weights: the stages of MPO, each from the one before."""
    workloads = [SEVEN[name] for name in SEVEN]
    if tiny:
        workloads = [_shrink(workload) for workload in workloads]
    inputs = work / "inputs"
    _prepare(workloads, inputs, with_reward=False)
    planner = ChainPlanner(inputs, workloads[0].model)
    plans = {workload.name: planner.plan(workload) for workload in workloads}  # before any minutes of a GPU are spent
    machine = results.content["figures"].get("machine")
    if machine is None:
        machine = run_in_worker([sys.executable, "-m", "benchmarks.machine"], workloads[0].spec(str(inputs)))
        results.save("machine", machine)
    base = inputs / "models" / workloads[0].model
    folders = {"base": base, "policy": base}
    for workload in workloads:
        planned, out = plans[workload.name], work / workload.name
        spec = workload.spec(str(inputs)) | {"out": str(out), "folders": {k: str(v) for k, v in folders.items()}}
        if workload.name not in results.content["figures"]:
            figures = _run_ours(results, spec)
            compared = _compare_with_goals(workload, figures, machine, inputs)
            if compared:
                planned["plan / peak"] = planned["planned GB"] / compared["peak GB"]
            results.save(workload.name, figures | compared | planned)
        if workload.kind == "reward":
            folders |= {"reward": out}
        elif workload.kind in ("sft", "dpo"):
            folders |= {"policy": out, "reference": out}
            folders.setdefault("sft", out)


def measure_peers(results: BenchmarkPartResults, work: Path, tiny: bool) -> None:
    """Ours and TRL or transformers in turn, on the same rows, from random weights."""
    workloads = [GPU[name] for name in PEERS]
    if tiny:
        workloads = [_shrink(CPU["dpo-20m"]), _shrink(CPU["sampling-20m"])]
    inputs = work / "inputs"
    for workload in workloads:
        if workload.name in results.content["figures"]:
            continue
        _prepare([workload], inputs)
        spec = workload.spec(str(inputs))
        machine = run_in_worker([sys.executable, "-m", "benchmarks.machine"], spec, max(1.0, results.seconds_left))
        figures: dict[str, Any] = {"machine": machine, "ours": _run_ours(results, spec)}
        module = PEER_MODULES.get(workload.kind, "benchmarks.peers.trl")
        command = [sys.executable, "-m", module]
        figures["peer"] = run_in_worker(command, {**spec, "settings": {}}, max(1.0, results.seconds_left))
        if "seconds" in figures["ours"] and "seconds" in figures["peer"]:
            figures["ratio"] = figures["peer"]["seconds"] / figures["ours"]["seconds"]
        results.save(workload.name, figures | _compare_with_goals(workload, figures["ours"], machine, inputs))


def run_hh(results: BenchmarkPartResults, work: Path, tiny: bool) -> None:
    """HH-RLHF with SmolLM2-135M, the paper's arms over three seeds; each seed is reported with those before it."""
    rows = CARRIED / "rows"
    settings = [
        f"data.train={rows / 'train.jsonl.gz'}",
        f"data.test={rows / 'test.jsonl.gz'}",
        "arms=[sft,dpo-base,dpo,ppo,mpo,mpo-sft-kl]",
        "sweep={}",
        "trace.arms=[]",
        f"cache={work / 'cache'}",
    ]
    if tiny:
        prepare_model(TINY_MODEL, work, CARRIED / "tokenizer", with_reward=False)
        settings += [f"model.path={work / 'models' / TINY_MODEL / 'model'}", "precision=float32", "arms=[sft,mpo]"]
        settings += [f"data.{name}=24" for name in ("train_rows", "test_rows", "demonstration_rows", "second_rows")]
        settings += ["samples.prompts=16", "evaluation.prompts=8", "max_completion_tokens=8", "reward.head=random"]
    for count in (1,) if tiny else (1, 2, 3):
        out = work / f"run-{count}"
        command = [sys.executable, "-m", "mixpo.cli.main", "run", "-q", "hh-rlhf-smollm2", *settings]
        command += [f"out={out}", f"seeds={list(range(count))}"]
        started = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, results.seconds_left))
        except subprocess.TimeoutExpired:
            results.save(f"{count} seeds", {"failed": f"timeout after {time.monotonic() - started:.0f} s"})
            return
        figures = {"seconds": time.monotonic() - started, "exit": done.returncode, "printed": done.stdout[-6000:]}
        results.save(f"{count} seeds", figures | ({"failed": done.stderr[-3000:]} if done.returncode else {}))
        if (out / "report.html").exists():
            shutil.copy(out / "report.html", results.path.with_name(f"{results.path.stem}.html"))


def _prepare(workloads: Iterable[Workload], inputs: Path, *, with_reward: bool = True) -> None:
    """Write the models, from random weights, and rows of workloads."""
    for workload in workloads:
        prepare_model(workload.model, inputs, CARRIED / "tokenizer", with_reward=with_reward)
        prepare_rows(workload, inputs, str(CARRIED / "rows" / "train.jsonl.gz"))


def _run_ours(results: BenchmarkPartResults, spec: dict[str, Any]) -> dict[str, Any]:
    """Run a workload with mixpo within the part's time."""
    if results.seconds_left < 10:
        return {"failed": "no time left in this part"}
    return run_in_worker([sys.executable, "-m", "benchmarks.ours"], spec, results.seconds_left)


def _compare_with_goals(
    workload: Workload, figures: dict[str, Any], machine: dict[str, Any], inputs: Path
) -> dict[str, Any]:
    """Shares of what the card was measured to do, peak memory in GB, and beside them what is aimed at."""
    if "seconds" not in figures or "matmul_flops" not in machine:
        return {}
    compared = {"peak GB": figures["peak_memory_mib"] * 2**20 / 1e9}
    if workload.kind == "sampling":
        decoding = figures["seconds"] - figures["prefill_seconds"]
        compared["share of the bandwidth"] = figures["read"] / decoding / machine["bandwidth"]
    elif workload.kind in ("sft", "reward", "dpo"):
        flops = json.loads((inputs / "rows" / workload.name / "counts.json").read_text(encoding="utf8"))["flops"]
        steps = figures["steps"]
        compared["share of the product rate"] = flops / figures["seconds"] / machine["matmul_flops"]
        # the first step compiles kernels
        later = max(1e-9, figures["seconds"] - steps[0]) * len(steps) / max(1, len(steps) - 1)
        compared["share of the product rate after the first step"] = flops / later / machine["matmul_flops"]
    name, goal = GOALS.get(workload.name, (None, None))
    return compared | ({f"goal: {name}": goal} if name else {})


def _shrink(workload: Workload) -> Workload:
    """A workload of the same kind for a minute on a CPU."""
    steps = min(workload.steps, 3)
    return replace(workload, model=TINY_MODEL, batch=2, steps=steps, new_tokens=8, max_tokens=128, prompt_tokens=64)


if __name__ == "__main__":
    app()
