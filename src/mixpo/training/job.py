"""The computation of one stage: its folder, its runtime, its processes and its cost."""

from pathlib import Path
from typing import Any

from mixpo.models.language_model import LanguageModel, Precision
from mixpo.models.loading import initialize_reward_model, load_policy, load_reward_model
from mixpo.models.saving import save_model
from mixpo.training.record import Cost, write_json
from mixpo.training.runtime import Runtime

SUMMARY, CHECKPOINT, PORTIONS = "summary.json", "checkpoint.safetensors", "portions.jsonl"
"""Files of a stage's folder: of a complete one, and those from which training and other work resume."""


def model_folder(folder: Path) -> Path:
    """Path of the model folder in a stage's folder."""
    return folder / "model"


class Job:
    """One computation of a stage: the folder that it writes, its runtime settings, its processes and its cost."""

    def __init__(self, out: Path, runtime: Runtime) -> None:
        self.out, self.runtime = out, runtime
        self.processes, self.cost = runtime.start_processes(), Cost()

    def load_policy(self, folder: Path, precision: Precision = "float32") -> LanguageModel:
        """Load the policy of a stage's folder onto this process's device."""
        return load_policy(model_folder(folder), device=self.processes.device, precision=precision)

    def load_reward_model(self, folder: Path, precision: Precision = "float32") -> LanguageModel:
        """Load the reward model of a stage's folder onto this process's device."""
        return load_reward_model(model_folder(folder), device=self.processes.device, precision=precision)

    def initialize_reward_model(self, folder: Path, *, seed: int, precision: Precision = "float32") -> LanguageModel:
        """Make a reward model of the policy in a stage's folder and a random head."""
        return initialize_reward_model(
            model_folder(folder), seed=seed, device=self.processes.device, precision=precision
        )

    def save_model(self, lm: LanguageModel) -> str:
        """Write `model/` and return its digest."""
        return save_model(lm, model_folder(self.out))

    def finish(self, **figures: Any) -> None:
        """Write `summary.json` (figures and cost), which completes the stage, and delete what it could resume from."""
        write_json(self.out / SUMMARY, {**figures, "cost": self.cost.summary()})
        for name in (CHECKPOINT, PORTIONS):
            (self.out / name).unlink(missing_ok=True)
