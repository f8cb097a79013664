"""The training loop of SFT, the reward model and DPO: epochs over rows, one optimizer step a batch."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pydantic
import torch
from torch import Tensor

from mixpo.data.branches import BranchBatch, Tokens, pack, row_lengths, split_into_microbatches
from mixpo.models.language_model import LanguageModel
from mixpo.training.checkpoint import Checkpoint, Stateful, TrainableWeights
from mixpo.training.parallel import Processes
from mixpo.training.record import Cost, Metrics
from mixpo.training.runtime import Runtime
from mixpo.training.step import (
    Diverged,
    OptimizerSettings,
    Sums,
    make_optimizer,
    scheduled_learning_rate,
    suggest_remedies,
    take_optimizer_step,
)


class SupervisedSettings(OptimizerSettings):
    """Epochs over rows."""

    epochs: int = pydantic.Field(1, ge=1)
    batch_size: int = pydantic.Field(ge=1)
    """Rows of one optimizer step."""


def count_steps(rows: int, settings: SupervisedSettings) -> int:
    """Count the optimizer steps of all epochs; an epoch's last batch may be smaller."""
    return settings.epochs * -(-rows // settings.batch_size)


def select_batch(step: int, rows: int, settings: SupervisedSettings, seed: int) -> list[int]:
    """Select the rows of a step: a new order every epoch, fixed by the seed, so no state of earlier steps is needed."""
    per_epoch = -(-rows // settings.batch_size)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return order[place * settings.batch_size : (place + 1) * settings.batch_size]


class SupervisedTraining:
    """A model in training on rows of a prompt and its completions: optimizer, checkpoint, metrics and cost.

    Made after the model has its adapters. It goes on from the checkpoint in `out`, if there is one.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Tokens],
        completions: Sequence[Sequence[Tokens]],
        *,
        settings: SupervisedSettings,
        seed: int,
        out: Path,
        cost: Cost,
        runtime: Runtime,
        processes: Processes,
    ) -> None:
        self.lm, self.prompts, self.completions = lm, prompts, completions
        self.settings, self.seed, self.cost, self.processes = settings, seed, cost, processes
        self.microbatch_tokens = runtime.microbatch_tokens
        self.lengths = row_lengths(prompts, completions)
        self.total_steps = count_steps(len(prompts), settings)
        self.optimizer = make_optimizer(lm.parameters(), settings)
        parts: dict[str, Stateful] = {"model": TrainableWeights(lm), "optimizer": self.optimizer}
        self.checkpoint = Checkpoint(out, parts, every_minutes=runtime.checkpoint_minutes, processes=processes)
        self.first_step, spent = self.checkpoint.resume()
        cost.resume(spent)
        self.metrics = Metrics(out, resumed_at=self.first_step, processes=processes)

    def steps(
        self, loss: Callable[[BranchBatch, list[int]], tuple[Tensor, Sums]], *, count: Callable[[list[int]], int]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Train, and yield (step, metrics) after every optimizer step; what is added to the metrics is logged too.

        `loss` gets a branch batch and the numbers of its rows, and returns the summed loss and what it adds to the
        metrics; `count` says what the loss of a batch is divided by. Raises `Diverged`.
        """
        for step in range(self.first_step, self.total_steps):
            started = time.perf_counter()
            rows = select_batch(step, len(self.prompts), self.settings, self.seed)
            self.lm.train()
            try:
                metrics = take_optimizer_step(
                    self.optimizer,
                    self._microbatches(rows),
                    lambda microbatch: loss(*microbatch),
                    count=count(rows),
                    max_grad_norm=self.settings.max_grad_norm,
                    rate=scheduled_learning_rate(step, total=self.total_steps, settings=self.settings),
                    processes=self.processes,
                )
            except Diverged as error:
                tips = suggest_remedies(
                    step, total=self.total_steps, settings=self.settings, precision=self.lm.precision
                )
                message = f"step {step + 1} of {self.total_steps}: {error}; try {' or '.join(tips)}"
                raise Diverged(message) from error
            metrics["tokens"] = sum(self.lengths[row] for row in rows)
            metrics["seconds"] = time.perf_counter() - started
            yield step, metrics
            self.metrics.add(step, self.total_steps, metrics)
            self.checkpoint.maybe_write(step + 1, self.cost.counts())

    def _microbatches(self, rows: list[int]) -> Iterator[tuple[BranchBatch, list[int]]]:
        share = self.processes.share(rows)
        for part in split_into_microbatches([self.lengths[row] for row in share], self.microbatch_tokens):
            chosen = [share[place] for place in part]
            batch = pack(self.prompts, self.completions, chosen, share_prompt=self.lm.shares_prompts)
            self.cost.trained(self.lm.model, batch.tokens)
            yield batch.to(self.lm.device), chosen
