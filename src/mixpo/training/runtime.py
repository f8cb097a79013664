"""Runtime settings of stages: devices, processes, memory and servers, none of which changes more than rounding."""

import os
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch

from mixpo.data.errors import InputError
from mixpo.models.samplers import LocalSampler, Sampler, SamplerName
from mixpo.models.vllm_sampler import VLLMSampler
from mixpo.models.vllm_server import check_vllm
from mixpo.settings import Settings
from mixpo.training import memory
from mixpo.training.parallel import StageProcesses

MICROBATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
SAMPLING_GIB = {"cpu": 2.0, "cuda": 16.0}
"""What is taken where a recipe does not say, by the kind of device."""


class Runtime(Settings):
    """Devices, processes, memory and servers. Not part of a stage's identity: results are the same up to rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    threads: int | None = pydantic.Field(None, ge=1)
    """CPU threads of a stage; if not given, all cores, which stages side by side share."""
    workers: int | Literal["cores", "gpus"] = 1
    """Stages computed in parallel, each in a process with its own models: small models use several cores better this
    way than by threads. `cores` means one a CPU core, and only one if there is a GPU; `gpus` as many as there are GPUs,
    each of which then has its own stage."""
    processes: int = pydantic.Field(1, ge=1)
    """Processes of this machine that compute each stage together, on rows of their own and each on a GPU if there are
    any. Where torchrun or a cluster starts them, their number is the launcher's."""
    sharded: bool = False
    """Cut weights, gradients and optimizer states over the processes of a stage, by PyTorch's `fully_shard`, instead of
    keeping all of them in each: for models that do not fit one GPU."""
    microbatch_tokens: int = pydantic.Field(default_factory=lambda: MICROBATCH_TOKENS[find_device_kind()], ge=1)
    """Tokens of one backward pass; if not given, 2,048 on a CPU, whose caches are small, and 16,384 on a GPU."""
    sampling_gib: float = pydantic.Field(default_factory=lambda: SAMPLING_GIB[find_device_kind()], gt=0)
    """GiB of the key-value cache while sampling; if not given, 2 on a CPU and 16 on a GPU."""
    cuda_graphs: bool = False
    """Record decoding steps as CUDA graphs and replay them; not run on a GPU yet. On a CPU the same steps, unrecorded.
    """
    activation_checkpointing: bool = False
    """Keep only the inputs of decoder layers for the backward pass, which computes the layers again: a third more time,
    and memory for one layer's activations instead of all layers'."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments, 8 bytes a trained weight, in CPU memory; each step takes them to the GPU and back.
    """
    vllm: str | None = None
    """For `sampler: vllm`: the address of a running server, or the path of a Python that has vLLM, with which every
    stage that samples starts one."""
    vllm_arguments: tuple[str, ...] = ()
    """Further command-line arguments of a vLLM server that a stage starts."""
    checkpoint_minutes: float = pydantic.Field(5.0, ge=0)
    """Time between two checkpoints of a stage; 0 writes one after every step."""

    @pydantic.field_validator("workers", mode="before")
    @classmethod
    def _check_workers(cls, workers: Any) -> Any:
        """Validator: raise ValueError unless it is a positive number, `cores` or `gpus`."""
        if workers not in ("cores", "gpus") and not (isinstance(workers, int) and workers >= 1):
            raise ValueError("a number of at least 1, cores or gpus")
        return workers

    def decide_defaults_here(self) -> "Runtime":
        """These settings with the defaults of this process, whose devices may be others than where they were made."""
        return type(self).model_validate(self.model_dump(exclude_unset=True))

    def count_workers(self) -> int:
        """Number of stages that this machine computes in parallel. Raises `InputError` if `gpus` are too few."""
        if self.workers == "gpus":
            names = () if self.device == "cpu" else list_gpu_names()
            if len(names) < self.processes:
                raise InputError(
                    f"runtime.workers: found gpus; expected at least {self.processes} for a stage (runtime.processes) "
                    f"and a device other than cpu, but torch finds {len(names) or 'none'} here; set runtime.workers to "
                    "a number, or to cores"
                )
            return len(names) // self.processes
        if self.workers == "cores":
            return 1 if list_gpu_names() and self.device != "cpu" else max(1, count_cores() // self.processes)
        return self.workers

    def set_up_processes(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> StageProcesses:
        """Set this process's threads and malloc, and choose its device; returns the processes of a stage.

        `local_rank` numbers the processes of one machine, each of which takes the GPU of its number. Raises
        `InputError` if there is no such GPU.
        """
        torch.set_num_threads(self.threads or count_own_cores())
        memory.keep_freed_memory()
        device = torch.device("cpu")
        if self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available()):
            if torch.cuda.device_count() <= local_rank:
                raise InputError(
                    f"runtime.device: found {self.device!r} for process {local_rank + 1} of a machine; expected a CUDA "
                    f"device for each, but torch finds {torch.cuda.device_count() or 'none'}; set runtime.device=cpu, "
                    "or start fewer processes"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        return StageProcesses(device, rank, count, self.sharded and count > 1)

    @property
    def sampling_bytes(self) -> int:
        """Bytes of the key-value cache while sampling."""
        return round(self.sampling_gib * 2**30)

    def make_sampler(self, name: SamplerName, folder: Path) -> Sampler:
        """Make the engine with which a stage samples completions; a server reads policies from the folder."""
        if name == "local":
            return LocalSampler(cache_bytes=self.sampling_bytes, fixed_shapes=self.cuda_graphs)
        place = self._require_vllm()
        return VLLMSampler(place, folder=folder, cache_bytes=self.sampling_bytes, arguments=self.vllm_arguments)

    def check_vllm(self, *, is_here: bool) -> None:
        """Raise `InputError` unless `vllm` is given, and, if it is here, names a server or a Python that has vLLM."""
        place = self._require_vllm()
        if is_here:
            check_vllm(place)

    def _require_vllm(self) -> str:
        """The setting `vllm`. Raises `InputError` if it is not given."""
        if self.vllm is None:
            raise InputError(
                "runtime.vllm: found nothing, with sampler: vllm; expected the address of a vLLM server, such as "
                "http://127.0.0.1:8000, or the path of a Python that has vLLM; see docs/vllm.md"
            )
        return self.vllm


def find_device_kind() -> Literal["cpu", "cuda"]:
    """The kind of device that `auto` takes on this machine."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def list_gpu_names() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them; none without a GPU."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (list(map(str, range(count))) if visible is None else visible.split(","))[:count]


def count_cores() -> int:
    """Count the CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_own_cores() -> int:
    """Count the CPU cores of this process where several compute a stage: its share, or those of its own Slurm task."""
    cores, environment = count_cores(), os.environ
    is_task = environment.get("SLURM_STEP_NUM_TASKS") == environment.get("WORLD_SIZE", "1")  # else torchrun's, or ours
    if is_task and "SLURM_CPUS_PER_TASK" in environment:
        return min(cores, int(environment["SLURM_CPUS_PER_TASK"]))
    return max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", 1)))
