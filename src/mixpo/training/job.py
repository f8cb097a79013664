"""The computation of one stage: its folder, its runtime, its processes and its cost."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mixpo.data.branches import AnyCompletions, Tokens, count_tokens_per_prompt, select_completions
from mixpo.models.language_model import LanguageModel, Precision
from mixpo.models.loading import initialize_reward_model, load_policy, load_reward_model
from mixpo.models.samplers import Sampler
from mixpo.models.saving import save_model
from mixpo.training.parallel import SharedSampler, StageProcesses
from mixpo.training.record import Cost, write_json
from mixpo.training.runtime import Runtime
from mixpo.training.sharding import gather_for_passes, gather_for_saving

SUMMARY, CHECKPOINT, PORTIONS = "summary.json", "checkpoint.safetensors", "portions.jsonl"
"""Files of a stage's folder: of a complete one, and those from which training and other work resume."""


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

    def load_policy(self, stage_folder: Path, precision: Precision = "float32") -> LanguageModel:
        """Load the policy in a stage's folder onto this process's device."""
        return load_policy(locate_model_folder(stage_folder), device=self.processes.device, precision=precision)

    def load_reward_model(self, stage_folder: Path, precision: Precision = "float32") -> LanguageModel:
        """Load the reward model in a stage's folder onto this process's device."""
        return load_reward_model(locate_model_folder(stage_folder), device=self.processes.device, precision=precision)

    def initialize_reward_model(
        self, stage_folder: Path, *, seed: int, precision: Precision = "float32"
    ) -> LanguageModel:
        """Make a reward model of the policy in a stage's folder and a random head."""
        return initialize_reward_model(
            locate_model_folder(stage_folder), seed=seed, device=self.processes.device, precision=precision
        )

    def save_model(self, lm: LanguageModel, folder: Path | None = None) -> str:
        """Write the model to `model/` in the job's folder, or to another folder; returns the digest of its files."""
        with gather_for_saving(lm, keep=self.processes.is_main_process):
            return self.processes.take_from_main(lambda: save_model(lm, folder or locate_model_folder(self.out)))

    def make_sampler(self) -> Sampler:
        """Make the engine that samples completions, every process some of them."""
        return SharedSampler(self.runtime.make_sampler(), self.processes)

    def compute_numbers(
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
        with gather_for_passes(lm):
            return self.processes.compute_tensors(len(prompts), compute_rows, order=longest_first)[0]

    def finish_stage(self, **figures: Any) -> None:
        """Write `summary.json` (figures and cost), which completes the stage, and delete what it could resume from."""
        self.processes.wait_for_all()
        if not self.processes.is_main_process:
            return
        write_json(self.out / SUMMARY, {**figures, "cost": self.cost.summarize()})
        for name in (CHECKPOINT, PORTIONS):
            (self.out / name).unlink(missing_ok=True)
