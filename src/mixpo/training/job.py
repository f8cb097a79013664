"""The computation of one stage: its folder, its runtime, its processes and its cost."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from mixpo.data.branches import AnyCompletions, Tokens, count_tokens_per_prompt, select_completions
from mixpo.models.adapters import LoraSettings
from mixpo.models.language_model import LanguageModel
from mixpo.models.loading import ModelLoader
from mixpo.models.network import Network, Precision
from mixpo.models.samplers import Sampler, SamplerName
from mixpo.models.saving import save_model
from mixpo.training.parallel import MultiProcessSampler, StageProcesses
from mixpo.training.record import Cost, write_json
from mixpo.training.runtime import Runtime
from mixpo.training.sharding import gather_for_passes, gather_for_saving

SUMMARY, CHECKPOINT, PORTIONS = "summary.json", "checkpoint.safetensors", "portions.jsonl"
"""Files of a stage's folder: of a complete one, and those from which training and other work resume."""
CHECKPOINT_TEMPORARY = "checkpoint.part"
"""Name of a checkpoint's file until it is whole."""
CHECKPOINT_SHARDS = "checkpoint-"
"""Beginning of the name of a folder with what a checkpoint has of weights that are cut."""
SAMPLING = "sampling"
"""Folder in a stage's folder from which a server that samples reads policies."""


def locate_model_folder(stage_folder: Path) -> Path:
    """Path of the folder `model/` in a stage's folder."""
    return stage_folder / "model"


class StageJob:
    """One computation of a stage: the folder that it writes, its runtime settings, its processes and its cost.

    With several processes, each has a job, and every one of them calls the methods that save, share and finish.
    """

    def __init__(self, out: Path, runtime: Runtime, processes: StageProcesses | None = None) -> None:
        self.out, self.runtime = out, runtime
        self.processes, self.cost = processes or runtime.set_up_processes(), Cost()
        self.models = ModelLoader(self.processes.device, prepare_network=self._prepare_network)
        self.samplers: dict[SamplerName, Sampler] = {}

    def load_policy(
        self, stage_folder: Path, precision: Precision = "float32", lora: LoraSettings | None = None
    ) -> LanguageModel:
        """Load the policy in a stage's folder, frozen; in 4 bits beside a model that `lora` trains so."""
        quantize = lora is not None and lora.quantize_base
        return self.models.load_policy(locate_model_folder(stage_folder), precision, quantize=quantize)

    def load_reward_model(
        self, stage_folder: Path, precision: Precision = "float32", lora: LoraSettings | None = None
    ) -> LanguageModel:
        """Load the reward model in a stage's folder, frozen; in 4 bits beside a model that `lora` trains so."""
        quantize = lora is not None and lora.quantize_base
        return self.models.load_reward_model(locate_model_folder(stage_folder), precision, quantize=quantize)

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

    def _prepare_network(self, network: Network) -> None:
        """Make a network compute as the runtime says, before adapters are added."""
        if self.runtime.activation_checkpointing:
            network.checkpoint_activations()
        self.processes.shard(network)

    def get_sampler(self, name: SamplerName = "local") -> Sampler:
        """The engine of this name, made at the first call, by which every process samples some of the completions."""
        if name not in self.samplers:
            own_sampler = self.runtime.make_sampler(name, self.out / SAMPLING)
            self.samplers[name] = MultiProcessSampler(own_sampler, self.processes)
        return self.samplers[name]

    def close(self) -> None:
        """End the servers that samplers have started."""
        for sampler in self.samplers.values():
            sampler.close()

    def save_model(self, lm: LanguageModel, folder: Path | None = None) -> str:
        """Write the model to `model/` in the job's folder, or to another folder; returns the digest of its files."""
        may_be_cut = not lm.adapters  # which stay whole
        with gather_for_saving(lm.network, keep=self.processes.is_main_process) if may_be_cut else nullcontext():
            return self.processes.take_from_main(lambda: save_model(lm, folder or locate_model_folder(self.out)))

    def compute_over_processes(
        self,
        compute: Callable[..., Tensor],
        lm: LanguageModel,
        prompts: Sequence[Tokens],
        completions: AnyCompletions,
        *arguments: Any,
    ) -> Tensor:
        """A tensor [prompts, k, ...] by a function of `mixpo.models.scoring`, every process some of the prompts."""
        lengths = count_tokens_per_prompt(prompts, completions)

        def compute_rows(rows: list[int]) -> list[Tensor]:
            """The entries of these prompts."""
            part = [prompts[row] for row in rows], select_completions(completions, rows)
            return [compute(lm, *part, *arguments, token_budget=self.runtime.microbatch_tokens)]

        longest_first = sorted(range(len(prompts)), key=lambda row: -lengths[row])
        with gather_for_passes(lm.network):
            return self.processes.compute_tensors(len(prompts), compute_rows, order=longest_first)[0]

    def finish_stage(self, **figures: Any) -> None:
        """Write `summary.json` (figures and cost), which completes the stage, and delete what it could resume from."""
        self.processes.wait_for_all()
        if not self.processes.is_main_process:
            return
        write_json(self.out / SUMMARY, {**figures, "cost": self.cost.summarize()})
        for name in (CHECKPOINT, CHECKPOINT_TEMPORARY, PORTIONS):
            (self.out / name).unlink(missing_ok=True)
        for folder in self.out.glob(f"{CHECKPOINT_SHARDS}*"):
            shutil.rmtree(folder, ignore_errors=True)
