"""A worker is a process of its own: it reads what to do from its one argument, and prints what it found as JSON."""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
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


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Do the work that the argument describes; print what it returns, with the peak memory (MiB) and the threads.

    Threads wait as OpenMP has it by default, on both sides, unless OMP_WAIT_POLICY is set for both.
    """
    found = work(json.loads(sys.argv[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    how = {"torch": torch.__version__, "threads": torch.get_num_threads(), "waiting": os.environ.get("OMP_WAIT_POLICY")}
    print(json.dumps({**found, "peak_memory_mib": peak, **how}))
