"""The training loop of SFT, the reward model and DPO: epochs over rows, one optimizer step a batch."""

import time
from collections.abc import Callable, Iterator, Sequence

import pydantic
from torch import Tensor

from mixpo.data.branches import BranchBatch, Tokens, count_tokens_per_prompt
from mixpo.models.language_model import LanguageModel
from mixpo.training.checkpoint import Checkpoint, TrainableWeights
from mixpo.training.job import StageJob
from mixpo.training.record import MetricsLog
from mixpo.training.step import (
    Diverged,
    OptimizerSettings,
    Sums,
    compute_learning_rate,
    iterate_microbatches,
    make_optimizer,
    select_batch_rows,
    suggest_divergence_remedies,
    take_optimizer_step,
)


class SupervisedSettings(OptimizerSettings):
    """Settings of supervised training: epochs and batch size."""

    epochs: int = pydantic.Field(1, ge=1)
    batch_size: int = pydantic.Field(ge=1)
    """Rows of one optimizer step."""


def count_optimizer_steps(row_count: int, settings: SupervisedSettings) -> int:
    """Count the optimizer steps of all epochs; the last batch of an epoch may be smaller."""
    return settings.epochs * -(-row_count // settings.batch_size)


class SupervisedTraining:
    """Supervised training of a model on prompts and completions, with optimizer, checkpoint, metrics and cost.

    Resumes from the checkpoint in the job's folder if there is one. Adapters must be added to the model before.
    """

    def __init__(
        self,
        job: StageJob,
        settings: SupervisedSettings,
        lm: LanguageModel,
        prompts: Sequence[Tokens],
        completions: Sequence[Sequence[Tokens]],
    ) -> None:
        self.job, self.settings, self.lm, self.prompts, self.completions = job, settings, lm, prompts, completions
        self.lengths = count_tokens_per_prompt(prompts, completions)
        self.total_steps = count_optimizer_steps(len(prompts), settings)
        self.optimizer = make_optimizer(lm.parameters(), settings, offload=job.runtime.offload_optimizer)
        self.checkpoint = Checkpoint(job, {"model": TrainableWeights(lm), "optimizer": self.optimizer})
        self.first_step, spent = self.checkpoint.restore_states()
        job.cost.restore_counts(spent)
        self.metrics = MetricsLog(job.out, resumed_at=self.first_step, processes=job.processes)

    def train_remaining_steps(
        self,
        compute_loss: Callable[[BranchBatch, list[int]], tuple[Tensor, Sums]],
        *,
        compute_divisor: Callable[[list[int]], int],
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Train all remaining steps; yields (step, metrics) after each, before the metrics are logged.

        `compute_loss` takes a branch batch and its row indices, and returns the summed loss and the metrics' sums;
        `compute_divisor` returns what the summed loss of a batch's rows is divided by, such as its number of tokens.
        Raises `Diverged`.
        """
        settings = self.settings

        for step in range(self.first_step, self.total_steps):
            started = time.perf_counter()
            rows = select_batch_rows(step, len(self.prompts), batch_size=settings.batch_size, seed=settings.seed)
            tokens = sum(self.lengths[row] for row in rows)
            self.job.cost.add_trained_tokens(self.lm, tokens)
            self.lm.train()
            try:
                metrics = take_optimizer_step(
                    self.optimizer,
                    iterate_microbatches(self.job, self.lm, self.prompts, self.completions, rows),
                    compute_loss,
                    loss_divisor=compute_divisor(rows),
                    max_grad_norm=settings.max_grad_norm,
                    learning_rate=compute_learning_rate(step, total_steps=self.total_steps, settings=settings),
                    processes=self.job.processes,
                )
            except Diverged as error:
                tips = suggest_divergence_remedies(step, total_steps=self.total_steps, settings=settings)
                message = f"step {step + 1} of {self.total_steps}: {error}; try {' or '.join(tips)}"
                raise Diverged(message) from error
            metrics["tokens"] = tokens
            metrics["seconds"] = time.perf_counter() - started
            yield step, metrics
            self.metrics.append_step(step, self.total_steps, metrics)
            self.checkpoint.write_checkpoint_if_due(step + 1, self.job.cost.get_counts())
