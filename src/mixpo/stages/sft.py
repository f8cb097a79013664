"""SFT: supervised fine-tuning on demonstrations, with the loss on completion tokens only."""

from collections.abc import Mapping
from pathlib import Path

import pydantic
import torch
from torch import Tensor

from mixpo.data.branches import BranchBatch
from mixpo.models.adapters import LoraSettings
from mixpo.stages.rows import read_tokenized_rows, report_truncation
from mixpo.stages.stage import DataStage, PolicyStage
from mixpo.training.health import compute_mean_of_last_steps, emit_alarms, find_loss_alarms
from mixpo.training.job import StageJob
from mixpo.training.step import Sums, suggest_divergence_remedies
from mixpo.training.supervised import SupervisedSettings, SupervisedTraining


class SFTSettings(SupervisedSettings):
    """Settings of supervised fine-tuning."""

    learning_rate: float = pydantic.Field(5e-5, gt=0)
    batch_size: int = pydantic.Field(16, ge=1)
    warmup_steps: int = pydantic.Field(500, ge=0)
    max_completion_tokens: int = pydantic.Field(512, ge=1)
    """Longer completions are cut, and then have no end token."""
    lora: LoraSettings | None = None


class SFT(PolicyStage, SFTSettings):
    """Stage of a policy trained on the mean negative log-likelihood of completion tokens, end tokens included."""

    base: PolicyStage
    data: DataStage

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Train a policy on the demonstrations, and write `model/`."""
        torch.manual_seed(self.seed)
        lm = job.load_trainable_policy(input_paths["base"], self.precision, self.lora)
        rows = read_tokenized_rows(input_paths["data"] / "demonstrations.parquet", lm.tokenizer)
        prompts = [row["prompt_tokens"] for row in rows]
        completions = [[row["tokens"][0][: self.max_completion_tokens]] for row in rows]
        truncated = sum(not lm.has_ended(completion[0]) for completion in completions)
        report_truncation("demonstrations", truncated, len(rows), self.max_completion_tokens)
        training = SupervisedTraining(job, self, lm, prompts, completions)

        def compute_sft_loss(batch: BranchBatch, rows: list[int]) -> tuple[Tensor, Sums]:
            """Summed negative log-likelihood of a microbatch's completion tokens, without metrics."""
            return -lm(batch, "logprobs").sum(), {}

        def count_tokens(rows: list[int]) -> int:
            """Number of completion tokens of these rows, by which their summed loss is divided."""
            return sum(len(completions[row][0]) for row in rows)

        for _ in training.train_remaining_steps(compute_sft_loss, compute_divisor=count_tokens):
            pass

        digest, metrics, total = job.save_model(lm), training.metrics.read_steps(), training.total_steps
        remedies = suggest_divergence_remedies(total - 1, total_steps=total, settings=self)
        job.finish_stage(
            model=digest,
            rows=len(rows),
            steps=total,
            alarms=emit_alarms(find_loss_alarms(metrics, remedies)),
            loss=compute_mean_of_last_steps(metrics, "loss"),
            truncated=truncated,
        )
