"""Runtime settings of stages: device, threads and batch sizes in tokens, none of which changes results."""

import os
from typing import Any, Literal

import pydantic
import torch

from mixpo.data.errors import InputError
from mixpo.models.samplers import LocalSampler, Sampler
from mixpo.settings import Settings
from mixpo.training import memory
from mixpo.training.parallel import StageProcesses


class Runtime(Settings):
    """Device and memory settings. Not part of a stage's identity: results are the same up to rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    threads: int | None = pydantic.Field(None, ge=1)
    """CPU threads of a stage; if not given, all cores, which stages side by side share."""
    workers: int = pydantic.Field(1, ge=1)
    """Stages computed in parallel, each in a process with its own models: small models use several cores better this
    way than by threads. `cores` means one a CPU core, and only one if there is a GPU."""
    microbatch_tokens: int = pydantic.Field(default_factory=lambda: 16_384 if torch.cuda.is_available() else 2048, ge=1)
    """Tokens of one backward pass; if not given, 2,048 on a CPU, whose caches are small, and 16,384 on a GPU."""
    sampling_gib: float = pydantic.Field(default_factory=lambda: 16.0 if torch.cuda.is_available() else 2.0, gt=0)
    """GiB of the key-value cache while sampling; if not given, 2 on a CPU and 16 on a GPU."""
    checkpoint_minutes: float = pydantic.Field(5.0, ge=0)
    """Time between two checkpoints of a stage; 0 writes one after every step."""

    @pydantic.field_validator("workers", mode="before")
    @classmethod
    def _resolve_workers(cls, workers: Any, others: pydantic.ValidationInfo) -> Any:
        """Validator: `cores` becomes the number of CPU cores, or 1 if stages use the GPU."""
        if workers != "cores":
            if not isinstance(workers, int):
                raise ValueError("a number of at least 1, or cores")
            return workers
        return 1 if torch.cuda.is_available() and others.data.get("device") != "cpu" else count_cores()

    def set_up_processes(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> StageProcesses:
        """Set this process's threads and malloc, and choose its device; returns the processes of a stage.

        `local_rank` numbers the processes of one machine, each of which takes the GPU of its number. Raises
        `InputError` if there is no such GPU.
        """
        torch.set_num_threads(self.threads or count_cores())
        memory.keep_freed_memory()
        device = torch.device("cpu")
        if self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available()):
            if torch.cuda.device_count() <= local_rank:
                raise InputError(
                    f"runtime.device: found {self.device!r} for process {local_rank + 1} of a machine; expected a CUDA "
                    f"device for each, but torch finds {torch.cuda.device_count() or 'none'}; set runtime.device=cpu, or "
                    "start fewer processes"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        return StageProcesses(device, rank, count)

    @property
    def sampling_bytes(self) -> int:
        """Bytes of the key-value cache while sampling."""
        return round(self.sampling_gib * 2**30)

    def make_sampler(self) -> Sampler:
        """Make the engine with which all stages sample completions."""
        return LocalSampler(cache_bytes=self.sampling_bytes)


def count_cores() -> int:
    """Count the CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
