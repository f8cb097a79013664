"""What is timed: the same model, rows, token limits, batch, precision and number of steps for us and for the peer."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["sft", "reward", "dpo", "ppo", "sampling"]


@dataclass(frozen=True)
class Workload:
    """One piece of work. All steps count, the first one too, on both sides."""

    name: str
    kind: Kind
    model: str
    """A folder's name under `inputs/models`."""
    batch: int
    """Rows of an optimizer step; prompts of a PPO iteration, or of the one call that samples."""
    steps: int
    max_tokens: int = 512
    """Longest prompt and completion together; longer rows are left out, nothing is cut."""
    new_tokens: int = 64
    """Most tokens that are drawn (PPO, sampling)."""
    prompt_tokens: int = 256
    """Longest prompt that completions are drawn for."""
    precision: str = "bfloat16"

    @property
    def rows(self) -> int:
        """Rows that the work reads."""
        return self.batch * self.steps

    def spec(self, inputs: str) -> dict[str, Any]:
        """Everything that a worker process has to know."""
        return {**asdict(self), "rows": self.rows, "inputs": inputs}


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

WORKLOADS = CPU | GPU

PEERS: dict[Kind, dict[str, dict[str, Any]]] = {
    "sft": {"trl": {}, "trl padding-free": {"padding_free": True, "max_length": None}},
    "reward": {"trl": {}},
    "dpo": {"trl": {}, "trl precomputed": {"precompute_ref_log_probs": True}},
    "ppo": {"trl-ppo": {}},
    "sampling": {"generate": {}, "generate float32": {"dtype": "float32"}, "continuous": {"continuous": True}},
}
"""The peer's settings that are tried, by what is timed; the best of them counts. The first word names the worker."""
