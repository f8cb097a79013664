"""Worker processes: the argument is a JSON specification, the last line of output the JSON result."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def median_seconds(work: Callable[[], Any], *, repeats: int, untimed: int) -> float:
    """Measure the median time of `compute` over `repeats` calls, after `untimed` ones, with GPU synchronization."""
    times = []
    for _ in range(untimed + repeats):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[untimed:])


def describe_environment() -> dict[str, Any]:
    """Processor, threads, versions, commit and date of a measurement."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf8") if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split("\t", 1) for line in info.splitlines() if "\t" in line)
    flags = lines.get("flags", "").split()
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    versions = {}
    for name in ("torch", "transformers", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "processor": " ".join([lines.get("model name", platform.processor()).strip(": \t"), *extensions]),
        "threads": torch.get_num_threads(),
        "waiting": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "when": datetime.now(UTC).date().isoformat(),
    }


def run_worker(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Call `compute` with the specification of the command line, and print its result, peak memory and environment.

    OpenMP's wait policy is the default for mixpo and peers, unless OMP_WAIT_POLICY is set.
    """
    result = work(json.loads(sys.argv[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({**result, "peak_memory_mib": peak, **describe_environment()}))
