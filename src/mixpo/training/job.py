"""The computation of one stage: its folder, its runtime, its processes and its cost."""

from pathlib import Path
from typing import Any

from mixpo.models.adapters import LoraSettings
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import ModelLoader
from mixpo.models.network import Precision
from mixpo.models.samplers import Sampler, SamplerName
from mixpo.models.saving import save_model
from mixpo.training.record import Cost, write_json
from mixpo.training.runtime import Runtime

SUMMARY, CHECKPOINT, PORTIONS = "summary.json", "checkpoint.safetensors", "portions.jsonl"
"""Files of a stage's folder: of a complete one, and those from which training and other work resume."""
SAMPLING = "sampling"
"""Folder in a stage's folder from which a server that samples reads policies."""


def locate_model_folder(stage_folder: Path) -> Path:
    """Path of the folder `model/` in a stage's folder."""
    return stage_folder / "model"


class StageJob:
    """One computation of a stage: the folder that it writes, its runtime settings, its processes and its cost."""

    def __init__(self, out: Path, runtime: Runtime) -> None:
        self.out, self.runtime = out, runtime
        self.processes, self.cost = runtime.set_up_processes(), Cost()
        self.models = ModelLoader(self.processes.device, checkpoints_activations=runtime.activation_checkpointing)
        self.samplers: dict[SamplerName, Sampler] = {}

    def load_policy(self, stage_folder: Path, precision: Precision = "float32") -> LanguageModel:
        """Load the policy in a stage's folder, frozen."""
        return self.models.load_policy(locate_model_folder(stage_folder), precision)

    def load_reward_model(self, stage_folder: Path, precision: Precision = "float32") -> LanguageModel:
        """Load the reward model in a stage's folder, frozen."""
        return self.models.load_reward_model(locate_model_folder(stage_folder), precision)

    def load_trainable_policy(
        self, stage_folder: Path, precision: Precision = "float32", lora: LoraSettings | None = None
    ) -> LanguageModel:
        """Load the policy in a stage's folder to train it, or new adapters on it."""
        return self.models.load_trainable_policy(locate_model_folder(stage_folder), precision, lora)

    def load_value_model(
        self, stage_folder: Path, precision: Precision = "float32", lora: LoraSettings | None = None
    ) -> LanguageModel:
        """Load the reward model in a stage's folder to train it as a value model, or new adapters on it."""
        return self.models.load_value_model(locate_model_folder(stage_folder), precision, lora)

    def initialize_reward_model(
        self, stage_folder: Path, *, seed: int, precision: Precision = "float32", lora: LoraSettings | None = None
    ) -> LanguageModel:
        """Make a reward model to train of the policy in a stage's folder and a random head."""
        folder = locate_model_folder(stage_folder)
        return self.models.initialize_reward_model(folder, seed=seed, precision=precision, lora=lora)

    def get_sampler(self, name: SamplerName = "local") -> Sampler:
        """The engine of this name that samples completions, made at the first call."""
        if name not in self.samplers:
            self.samplers[name] = self.runtime.make_sampler(name, self.out / SAMPLING)
        return self.samplers[name]

    def close(self) -> None:
        """End the servers that samplers have started."""
        for sampler in self.samplers.values():
            sampler.close()

    def save_model(self, lm: LanguageModel) -> str:
        """Write the model to `model/` in the job's folder; returns the digest of its files."""
        return save_model(lm, locate_model_folder(self.out))

    def finish_stage(self, **figures: Any) -> None:
        """Write `summary.json` (figures and cost), which completes the stage, and delete what it could resume from."""
        write_json(self.out / SUMMARY, {**figures, "cost": self.cost.summarize()})
        for name in (CHECKPOINT, PORTIONS):
            (self.out / name).unlink(missing_ok=True)
