"""Workloads: model, rows, token limits, batch, precision and steps, the same for mixpo and its peers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["sft", "reward", "dpo", "ppo", "sampling"]


@dataclass(frozen=True)
class Workload:
    """One training or sampling run; all steps are timed, the first included."""

    name: str
    kind: Kind
    model: str
    """Name of a folder under `inputs/models`."""
    batch: int
    """Rows of an optimizer step; prompts of a PPO iteration or of the sampling call."""
    steps: int
    max_tokens: int = 512
    """Most tokens of a prompt and a completion together; longer rows are left out."""
    new_tokens: int = 64
    """Most tokens of a sampled completion (PPO, sampling)."""
    prompt_tokens: int = 256
    """Most tokens of a prompt to sample from (PPO, sampling)."""
    precision: str = "bfloat16"
    lora: int | None = None
    """Rank of the adapters that train; None trains all weights."""
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """Runtime settings of mixpo."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch * self.steps

    def spec(self, inputs: str) -> dict[str, Any]:
        """Specification for a worker process."""
        adapted = {name: value for name, value in asdict(self).items() if name not in ("lora", "runtime") or value}
        return {**adapted, "rows": self.rows, "inputs": inputs}


CPU = {
    workload.name: workload
    for workload in (
        Workload("dpo-20m", "dpo", "20m", batch=8, steps=8),
        Workload("dpo-135m", "dpo", "135m", batch=8, steps=3),
        Workload("reward-20m", "reward", "20m", batch=8, steps=12),
        Workload("reward-135m", "reward", "135m", batch=8, steps=3),
        Workload("sft-20m", "sft", "20m", batch=8, steps=12),
        Workload("sft-135m", "sft", "135m", batch=8, steps=3),
        Workload("sampling-20m", "sampling", "20m", batch=64, steps=1),
        Workload("sampling-135m", "sampling", "135m", batch=64, steps=1),
        Workload("ppo-20m", "ppo", "20m", batch=32, steps=3),
        Workload("ppo-135m", "ppo", "135m", batch=16, steps=2),
    )
}

GPU = {
    workload.name: workload
    for workload in (
        Workload("gpu-dpo-135m", "dpo", "135m", batch=64, steps=16, max_tokens=1024),
        Workload("gpu-dpo-1b", "dpo", "1b", batch=64, steps=8, max_tokens=1024),
        Workload("gpu-reward-1b", "reward", "1b", batch=64, steps=8, max_tokens=1024),
        Workload("gpu-sampling-135m", "sampling", "135m", batch=256, steps=1, new_tokens=256),
        Workload("gpu-sampling-1b", "sampling", "1b", batch=256, steps=1, new_tokens=256),
        Workload("gpu-ppo-135m", "ppo", "135m", batch=256, steps=4, new_tokens=128),
        Workload("gpu-ppo-1b", "ppo", "1b", batch=128, steps=3, new_tokens=128),
    )
}
"""For one GPU; not run yet."""

FRUGAL = {"activation_checkpointing": True, "microbatch_tokens": 8192}
SEVEN = {
    workload.name: workload
    for workload in (
        Workload("gpu-sft-7b", "sft", "7b", batch=64, steps=3, lora=16, runtime=FRUGAL),
        Workload("gpu-reward-7b", "reward", "7b", batch=64, steps=2, lora=16, runtime=FRUGAL),
        Workload("gpu-dpo-7b", "dpo", "7b", batch=64, steps=4, lora=16, runtime=FRUGAL),
        Workload("gpu-ppo-7b", "ppo", "7b", batch=64, steps=2, new_tokens=128, lora=16, runtime=FRUGAL),
        Workload("gpu-sampling-7b", "sampling", "7b", batch=256, steps=1, new_tokens=128, prompt_tokens=128),
        Workload(
            "gpu-sampling-7b-graphs",
            "sampling",
            "7b",
            batch=256,
            steps=1,
            new_tokens=128,
            prompt_tokens=128,
            runtime={"cuda_graphs": True},
        ),
    )
}
"""A 7B model with adapters on one GPU, each stage from the one before, as MPO goes: `benchmarks/gpu`; not run yet."""

WORKLOADS = CPU | GPU | SEVEN

PEERS: dict[Kind, dict[str, dict[str, Any]]] = {
    "sft": {"trl": {}, "trl padding-free": {"padding_free": True, "max_length": None}},
    "reward": {"trl": {}},
    "dpo": {"trl": {}, "trl precomputed": {"precompute_ref_log_probs": True}},
    "ppo": {"trl-ppo": {}},
    "sampling": {"generate": {}, "generate float32": {"dtype": "float32"}, "continuous": {"continuous": True}},
}
"""Settings of peers by kind of workload; the fastest counts. The first word of the name selects the worker."""
