"""The memory of this process: what is fetched and given back, and the most that was held."""

import ctypes
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def keep_freed_memory() -> None:
    """Make glibc's malloc keep what is freed: fetching every large tensor's pages anew costs a tenth of the time."""
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # malloc.h
    with suppress(OSError, AttributeError):
        _libc().mallopt(mmap_max, 0)
        _libc().mallopt(trim_threshold, 1 << 30)
        _libc().mallopt(arena_max, 1)  # else every thread keeps its own


def read_peak_mib() -> float:
    """Peak memory so far: the GPU's where one is used, else the process's resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="utf8")
        return float(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    """Give back what malloc keeps of earlier work, and start measuring the peak anew, where the system allows it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):
        _libc().malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf8")


def _libc() -> Any:
    """glibc. Raises OSError or AttributeError on another system, or with another libc."""
    return ctypes.CDLL("libc.so.6")
