"""Memory of this process: settings of malloc, and the peak."""

import ctypes
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory; otherwise page faults of large tensors take a tenth of the time."""
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # malloc.h
    with suppress(OSError, AttributeError):
        _load_glibc().mallopt(mmap_max, 0)
        _load_glibc().mallopt(trim_threshold, 1 << 30)
        _load_glibc().mallopt(arena_max, 1)  # else every thread keeps its own


def read_peak_memory_mib() -> float:
    """Peak memory in MiB: of the GPU if one is used, else of the process's resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="utf8")
        return float(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak_memory() -> None:
    """Return freed memory to the system and restart measuring the GPU's and the process's peak, if possible."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):
        _load_glibc().malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf8")


def _load_glibc() -> Any:
    """The C library glibc, to call its functions. Raises OSError on other systems."""
    return ctypes.CDLL("libc.so.6")
