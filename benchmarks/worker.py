"""A worker is a process of its own: it reads what to do from its one argument, and prints what it found as JSON."""

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Do the work that the argument describes; print what it returns, with the peak memory (MiB) of this process."""
    found = work(json.loads(sys.argv[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({**found, "peak_memory_mib": peak, "torch": torch.__version__}))
