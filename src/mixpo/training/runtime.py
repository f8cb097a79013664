"""Where and in what portions a stage computes: none of it changes what is computed."""

import os
from typing import Any, Literal

import pydantic
import torch

from mixpo.models.samplers import LocalSampler, Sampler
from mixpo.settings import Settings
from mixpo.training import memory
from mixpo.training.parallel import Processes


class Runtime(Settings):
    """Device and portions. Not part of a stage's identity: the same numbers come out, to float rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    threads: int | None = pydantic.Field(None, ge=1)
    """CPU threads of a stage; if not given, all cores, which stages side by side share."""
    workers: int = pydantic.Field(1, ge=1)
    """Stages computed side by side, in processes that hold a stage's models each: small models use several cores better
    so than by threads. `cores` is one a CPU core, and one in all where there is a GPU."""
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

    @pydantic.field_validator("workers", mode="before")
    @classmethod
    def _count(cls, workers: Any, others: pydantic.ValidationInfo) -> Any:
        if workers != "cores":
            if not isinstance(workers, int):
                raise ValueError("a number of at least 1, or cores")
            return workers
        return 1 if torch.cuda.is_available() and others.data.get("device") != "cpu" else count_cores()

    def start(self) -> Processes:
        """Set up this process's threads, memory and device."""
        torch.set_num_threads(self.threads or count_cores())
        memory.keep_freed_memory()
        cuda = torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"
        return Processes(torch.device("cuda" if cuda else "cpu"))

    def make_sampler(self) -> Sampler:
        """Make the engine that stages sample with."""
        return LocalSampler(cache_tokens=self.sampling_tokens)


def count_cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
