"""A worker is a process of its own: it reads what to do from its one argument, and prints what it found as JSON."""

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
    """Median time of `work` over `repeats` calls, after `untimed` ones; a GPU's queue is waited for."""
    times = []
    for _ in range(untimed + repeats):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[untimed:])


def provenance() -> dict[str, Any]:
    """On what and with what it was measured, and when."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf8") if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split("\t", 1) for line in info.splitlines() if "\t" in line)
    flags = lines.get("flags", "").split()
    extensions = [one for one in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if one in flags]
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


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Do the work that the argument describes; print what it returns, with the peak memory (MiB) and the provenance.

    Threads wait as OpenMP has it by default, on both sides, unless OMP_WAIT_POLICY is set for both.
    """
    found = work(json.loads(sys.argv[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({**found, "peak_memory_mib": peak, **provenance()}))
