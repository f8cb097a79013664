"""Where and in what portions a stage computes: none of it changes what is computed."""

import ctypes
import os
from contextlib import suppress
from typing import Literal

import pydantic
import torch

from mixpo.settings import Settings


class Runtime(Settings):
    """Device and portions. Not part of a stage's identity: the same numbers come out, to float rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    threads: int | None = pydantic.Field(None, ge=1)
    """CPU threads of a process; if not given, the workers share the cores."""
    workers: int | Literal["cores"] = pydantic.Field(1)
    """Stages computed side by side, each in a process with its own models: small models use several cores better
    than threads do. `cores` is one a CPU core."""
    microbatch_tokens: int = pydantic.Field(default_factory=lambda: 16_384 if torch.cuda.is_available() else 2048, ge=1)
    """Tokens of one backward pass; if not given, 2,048 on a CPU, whose caches are small, and 16,384 on a GPU."""
    sampling_tokens: int = pydantic.Field(65_536, ge=1)
    """Tokens in the key-value cache at once while sampling."""
    checkpoint_minutes: float = pydantic.Field(5.0, ge=0)
    """Time between two checkpoints of a stage; 0 writes one after every step."""

    @pydantic.field_validator("device")
    @classmethod
    def _is_there(cls, device: str) -> str:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("cpu or auto here: torch finds no CUDA device")
        return device

    @pydantic.field_validator("workers")
    @classmethod
    def _is_some(cls, workers: int | str) -> int | str:
        if isinstance(workers, int) and workers < 1:
            raise ValueError("1 or more, or cores")
        return workers

    @property
    def processes(self) -> int:
        """The number of workers."""
        return _cores() if self.workers == "cores" else self.workers

    def start(self) -> torch.device:
        """Make this process ready to compute: its threads and its memory; the device to use."""
        torch.set_num_threads(self.threads or max(1, _cores() // self.processes))
        _keep_freed_memory()
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


def _cores() -> int:
    return os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Make glibc's malloc keep what is freed: fetching every large tensor's pages anew costs a tenth of the time."""
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # malloc.h
    with suppress(OSError, AttributeError):  # another system, another libc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 1 << 30)
        mallopt(arena_max, 1)
