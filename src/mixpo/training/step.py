"""The optimizer step of every stage: accumulate gradients, normalise by the whole batch, clip, stop if not finite."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from mixpo.data.branches import (
    AnyCompletions,
    BranchBatch,
    Tokens,
    count_tokens_per_prompt,
    pack_branches,
    select_completions,
    split_into_microbatches,
)
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Precision
from mixpo.settings import Settings
from mixpo.training.job import StageJob
from mixpo.training.optimizers import OffloadedAdamW, make_8bit_adamw
from mixpo.training.parallel import StageProcesses
from mixpo.training.sharding import clip_gradients

Sums = Mapping[str, tuple[Tensor, Tensor]]
"""Sum and count of each metric over a microbatch."""


@dataclass(frozen=True)
class Microbatch:
    """What one backward pass computes: a branch batch and the indices of its rows in the whole set."""

    batch: BranchBatch
    rows: list[int]
    is_padding: bool = False
    """True if it counts for nothing, and is there because other processes have more microbatches."""


class Diverged(RuntimeError):
    """Exception: training diverged; the message says at which step and what to try."""


class SeededSettings(Settings):
    """Settings of stages that compute with a model: seed and precision."""

    seed: int = pydantic.Field(0, ge=0)
    precision: Precision = "float32"
    """`bfloat16` runs matrix products in bfloat16 (autocast), weights and optimizer stay in float32."""


class OptimizerSettings(SeededSettings):
    """Settings of AdamW, its learning-rate schedule and gradient clipping."""

    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """`adamw-8bit` keeps its moments in 8 bits, 2 bytes a weight instead of 8; it needs the package bitsandbytes."""
    learning_rate: float = pydantic.Field(gt=0)
    """Peak learning rate."""
    warmup_steps: int = pydantic.Field(0, ge=0)
    """Optimizer steps in which the learning rate rises linearly to its peak; at most half of all steps."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate's decay after the warm-up, to a tenth of the peak."""
    weight_decay: float = pydantic.Field(0.0, ge=0)
    adam_betas: tuple[Annotated[float, pydantic.Field(ge=0, lt=1)], Annotated[float, pydantic.Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    max_grad_norm: float = pydantic.Field(1.0, gt=0)
    """Gradients are scaled down to this norm; the norm before it is logged."""


def suggest_divergence_remedies(step: int, *, total_steps: int, settings: OptimizerSettings) -> list[str]:
    """Changes of settings to try after a divergence at an optimizer step, as texts; only those with an effect there."""
    warmup = min(settings.warmup_steps, total_steps // 2)
    remedies = [f"a lower learning_rate (now {settings.learning_rate:g})"]
    if step == 0:
        remedies = ["another model or other rows, since nothing was trained before"]
    elif step < max(2 * warmup, total_steps // 10) and warmup < total_steps // 2:
        remedies.append(f"more warmup_steps (now {settings.warmup_steps})")
    return remedies if settings.precision == "float32" else [*remedies, "precision: float32"]


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: OptimizerSettings, *, offload: bool = False
) -> torch.optim.Optimizer:
    """Make AdamW over the trainable parameters; biases, norms and other vectors have no weight decay.

    With `offload` AdamW's moments stay in CPU memory. Moments in 8 bits need whole weights.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rates: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.adam_betas}
    if settings.optimizer == "adamw-8bit":
        return make_8bit_adamw(groups, **rates)
    return (OffloadedAdamW if offload else torch.optim.AdamW)(groups, **rates, fused=True)


def compute_learning_rate(
    step: int, *, total_steps: int, settings: OptimizerSettings, peak_rate: float | None = None
) -> float:
    """Learning rate of a step (counted from 0) out of `total_steps`; `peak_rate` replaces the setting."""
    peak_rate = settings.learning_rate if peak_rate is None else peak_rate
    warmup = min(settings.warmup_steps, total_steps // 2)
    if step < warmup:
        return peak_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if settings.decay == "constant":
        return peak_rate
    fall = progress if settings.decay == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return peak_rate * (1 - 0.9 * fall)


def select_batch_rows(step: int, row_count: int, *, batch_size: int, seed: int) -> list[int]:
    """Row indices of a step's batch; each epoch has its own order, a function of the seed and the epoch alone."""
    epoch, place = divmod(step, -(-row_count // batch_size))
    order = torch.randperm(row_count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    rows: list[int] = order[place * batch_size : (place + 1) * batch_size].tolist()
    return rows


def iterate_microbatches(
    job: StageJob, lm: LanguageModel, prompts: Sequence[Tokens], completions: AnyCompletions, batch_rows: Sequence[int]
) -> Iterator[Microbatch]:
    """Yield the microbatches of this process's share of a batch, equally many in every process if weights are cut."""
    lengths = count_tokens_per_prompt([prompts[row] for row in batch_rows], select_completions(completions, batch_rows))
    longest_first, processes = sorted(range(len(batch_rows)), key=lambda index: -lengths[index]), job.processes

    def split_share(rank: int) -> list[list[int]]:
        """The microbatches of a process, as lists of row indices."""
        own = processes.select_rows_of(rank, longest_first)
        parts = split_into_microbatches([lengths[index] for index in own], job.runtime.microbatch_tokens)
        return [[batch_rows[own[index]] for index in part] for part in parts]

    shares = split_share(processes.rank)
    most = max(len(split_share(rank)) for rank in range(processes.count)) if processes.is_sharded else len(shares)
    for number in range(most):
        is_padding = number >= len(shares)
        rows = [batch_rows[longest_first[-1]]] if is_padding else shares[number]
        batch = pack_branches(prompts, completions, rows, share_prompt=lm.shares_prompts)
        yield Microbatch(batch.to(processes.device), rows, is_padding)


def take_optimizer_step(
    optimizer: torch.optim.Optimizer,
    microbatches: Iterable[Microbatch],
    compute_loss: Callable[[BranchBatch, list[int]], tuple[Tensor, Sums]],
    *,
    loss_divisor: int,
    max_grad_norm: float,
    learning_rate: float,
    processes: StageProcesses,
) -> dict[str, float]:
    """Take one optimizer step on the microbatches' summed losses / `loss_divisor`; returns the metrics' means.

    `compute_loss` takes a microbatch's branch batch and row indices, and returns its summed loss and its metrics' sums.
    The loss is divided by `loss_divisor`, the tokens or pairs of the whole batch, and gradients are summed over the
    processes, so that microbatches and processes change nothing but rounding. Also returned: `loss`, `grad_norm`
    (before clipping), `learning_rate`. Raises `Diverged`, in every process and before weights change, if the loss or
    the gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own_loss = 0.0
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for microbatch in microbatches:
        summed, metrics = compute_loss(microbatch.batch, microbatch.rows)
        if microbatch.is_padding:
            (0.0 * summed).backward()
            continue
        (summed * processes.gradient_factor / loss_divisor).backward()
        own_loss += float(summed.detach()) / loss_divisor
        for name, (amount, number) in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(amount)
            counts[name] = counts.get(name, 0.0) + float(number)
    losses, all_sums, all_counts = zip(*processes.gather((own_loss, sums, counts)), strict=True)
    if not math.isfinite(sum(losses)):
        raise Diverged(f"the loss is {sum(losses)}")
    processes.sum_gradients(parameters)
    norm = clip_gradients(parameters, max_grad_norm)
    if not math.isfinite(norm):
        raise Diverged(f"the norm of the gradient is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    sums, counts = _add_up(all_sums), _add_up(all_counts)
    means = {name: sums[name] / counts[name] if counts[name] else math.nan for name in sums}
    return {"loss": sum(losses), **means, "grad_norm": norm, "learning_rate": learning_rate}


def _add_up(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name of the numbers that several mappings hold."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, number in part.items():
            sums[name] = sums.get(name, 0.0) + number
    return sums
