"""The loop that SFT, the reward model and DPO share: epochs over rows, one `update` a batch."""

import time
from collections.abc import Callable, Iterator, Sequence

import pydantic
import torch
from torch import Tensor

from mixpo.data.branches import BranchBatch, Tokens, by_tokens, pack, row_lengths
from mixpo.models.language_model import LanguageModel
from mixpo.training.step import Diverged, OptimizerSettings, Sums, learning_rate, remedies, update


class SupervisedSettings(OptimizerSettings):
    """Epochs over rows."""

    epochs: int = pydantic.Field(1, ge=1)
    batch_size: int = pydantic.Field(ge=1)
    """Rows of one optimizer step."""


def steps_of(rows: int, settings: SupervisedSettings) -> int:
    """Optimizer steps over all epochs; an epoch's last batch may be smaller."""
    return settings.epochs * -(-rows // settings.batch_size)


def batch_rows(step: int, rows: int, settings: SupervisedSettings, seed: int) -> list[int]:
    """The rows of a step: a fresh order every epoch, fixed by the seed, so a step needs no memory of earlier ones."""
    per_epoch = -(-rows // settings.batch_size)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return order[place * settings.batch_size : (place + 1) * settings.batch_size]


def supervised(
    lm: LanguageModel,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Tokens],
    completions: Sequence[Sequence[Tokens]],
    loss: Callable[[BranchBatch, list[int]], tuple[Tensor, Sums]],
    *,
    count: Callable[[list[int]], int],
    settings: SupervisedSettings,
    seed: int,
    first_step: int,
    microbatch_tokens: int,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, metrics) after every optimizer step, from `first_step` on.

    `loss` gets a branch batch and the numbers of its rows; `count` says what the loss of a batch is divided by.
    """
    lengths = row_lengths(prompts, completions)
    total = steps_of(len(prompts), settings)
    for step in range(first_step, total):
        started = time.perf_counter()
        rows = batch_rows(step, len(prompts), settings, seed)

        def microbatches(rows: list[int] = rows) -> Iterator[tuple[BranchBatch, list[int]]]:
            for part in by_tokens([lengths[row] for row in rows], microbatch_tokens):
                chosen = [rows[place] for place in part]
                batch = pack(
                    [prompts[row] for row in chosen],
                    [completions[row] for row in chosen],
                    share_prompt=lm.shares_prompts,
                )
                yield batch.to(lm.device), chosen

        lm.train()
        try:
            metrics = update(
                optimizer,
                microbatches(),
                lambda part: loss(*part),
                count=count(rows),
                max_grad_norm=settings.max_grad_norm,
                rate=learning_rate(step, total=total, settings=settings),
            )
        except Diverged as error:
            tips = remedies(step, total=total, settings=settings, precision=lm.precision)
            raise Diverged(f"step {step + 1} of {total}: {error}; try {' or '.join(tips)}") from error
        tokens = sum(lengths[row] for row in rows)
        yield step, {**metrics, "tokens": tokens, "seconds": time.perf_counter() - started}
