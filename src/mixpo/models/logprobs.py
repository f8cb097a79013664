"""Log-probs and entropies of tokens from hidden states, without all logits in memory at once."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 1 << 25
"""Logits in memory at once: 128 MiB in float32."""
BLOCK_LOGITS = {"cpu": 1 << 18, "cuda": CHUNK_LOGITS}
"""Logits cast to float32 at once: 1 MiB on a CPU, so that they stay in its caches; a whole chunk on a GPU."""
STORED_LOGIT_GRADIENTS = 1 << 27
"""Most gradients of logits that are stored for the backward pass: 256 MiB in bfloat16."""


def compute_target_logprobs(
    hidden: Float[Tensor, "n width"],
    head: Any,
    targets: Int[Tensor, " n"],
    *,
    dtype: torch.dtype,
    with_entropy: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(log-prob of each target token, entropy of its distribution or 0) in nats, under a linear output head.

    Products are computed in `dtype`. Entropies have no gradient.
    """
    logprobs, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, dtype, with_entropy, torch.is_grad_enabled()
    )
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight^T + bias)[target] of each row, in chunks, so that not all logits are in memory.

    d logprob / d logits = onehot(target) - softmax overwrites the logits of a chunk. The forward pass multiplies it by
    the weight at once: the gradient of `hidden` is that product times a factor a row. The gradient of `weight` needs
    d logits of all rows, which are stored if they are few, and computed again in chunks of columns if they are many.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n width"],
        weight: Float[Tensor, "vocabulary width"],
        bias: Float[Tensor, " vocabulary"] | None,
        targets: Int[Tensor, " n"],
        dtype: torch.dtype,
        with_entropy: bool,
        needs_gradient: bool,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        hidden_cast, weight_cast = hidden.to(dtype), weight.to(dtype)
        logprobs, entropies, normalizers = torch.zeros(3, len(targets), device=hidden.device)
        hidden_directions = torch.empty_like(hidden_cast) if needs_gradient else None
        needs_weight_gradient = needs_gradient and any(ctx.needs_input_grad[1:3])
        fits = len(targets) * len(weight) <= STORED_LOGIT_GRADIENTS
        logit_gradients = hidden_cast.new_empty(len(targets), len(weight)) if needs_weight_gradient and fits else None
        for rows in iterate_row_slices(len(targets), CHUNK_LOGITS // len(weight)):
            logits = torch.mm(
                hidden_cast[rows], weight_cast.T, out=None if logit_gradients is None else logit_gradients[rows]
            )
            logprobs[rows], entropies[rows], normalizers[rows] = _compute_logprobs_from_logits(
                logits, bias, targets[rows], with_entropy, needs_gradient
            )
            if hidden_directions is not None:
                hidden_directions[rows] = logits @ weight_cast
            del logits  # else two chunks are in memory while the next is made
        ctx.save_for_backward(hidden_cast, weight_cast, bias, targets, normalizers, hidden_directions, logit_gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, " n"], _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers, hidden_directions, logit_gradients = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        needed = ctx.needs_input_grad[:3]
        hidden_gradient = (hidden_directions * gradient[:, None]).to(hidden_dtype)
        weight_gradient = torch.empty_like(weight, dtype=weight_dtype) if needed[1] else None
        bias_gradient = torch.empty_like(bias) if needed[2] else None
        if weight_gradient is None and bias_gradient is None:
            return hidden_gradient, *[None] * 6
        scaled = (hidden * gradient[:, None]).to(hidden.dtype)
        for columns in iterate_row_slices(len(weight), CHUNK_LOGITS // max(1, *hidden.shape)):
            if logit_gradients is None:
                logit_gradient = _compute_logit_gradient(hidden, weight, bias, targets, normalizers, columns)
            else:
                logit_gradient = logit_gradients[:, columns]
            if weight_gradient is not None:
                weight_gradient[columns] = logit_gradient.T @ scaled
            if bias_gradient is not None:
                bias_gradient[columns] = logit_gradient.T.float() @ gradient
        return hidden_gradient, weight_gradient, bias_gradient, *[None] * 4


def _compute_logprobs_from_logits(
    logits: Float[Tensor, "n vocabulary"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " n"],
    with_entropy: bool,
    needs_gradient: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-probs of the targets, entropies (0 if not `with_entropy`) and log sum exp of each row.

    Overwrites the logits: with d logprob / d logits if `needs_gradient`, else with nothing of use. Elementwise
    operations run in float32, in blocks that fit into a CPU's caches.
    """
    logprobs, entropies, normalizers = torch.zeros(3, len(targets), device=logits.device)
    for rows in iterate_row_slices(len(targets), BLOCK_LOGITS[logits.device.type] // logits.shape[1]):
        float_logits = logits[rows].float() if bias is None else logits[rows].float() + bias
        largest = float_logits.amax(dim=-1, keepdim=True)
        float_logits -= largest
        target = float_logits.gather(-1, targets[rows, None])[:, 0]
        unnormalized_probabilities = float_logits.exp() if with_entropy else float_logits.exp_()
        total = unnormalized_probabilities.sum(dim=-1)
        logprobs[rows] = target - total.log()
        normalizers[rows] = largest[:, 0] + total.log()
        if with_entropy:
            entropies[rows] = total.log() - torch.linalg.vecdot(unnormalized_probabilities, float_logits) / total
        if needs_gradient:
            ones = torch.ones_like(total)[:, None]
            negated = unnormalized_probabilities.mul_(-1 / total[:, None])
            logits[rows] = negated.scatter_add_(1, targets[rows, None], ones)
    return logprobs, entropies, normalizers


def _compute_logit_gradient(
    hidden: Float[Tensor, "n width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " n"],
    normalizers: Float[Tensor, " n"],
    columns: slice,
) -> Float[Tensor, "n columns"]:
    """d logprob / d logits of some columns, from the log sum exp (`normalizers`) of each row."""
    logits = hidden @ weight[columns].T
    column_targets = targets - columns.start
    in_columns = (column_targets >= 0) & (column_targets < logits.shape[1])
    for rows in iterate_row_slices(len(targets), BLOCK_LOGITS[logits.device.type] // logits.shape[1]):
        float_logits = logits[rows].float() if bias is None else logits[rows].float() + bias[columns]
        negated = float_logits.sub_(normalizers[rows, None]).exp_().neg_()
        index = column_targets[rows, None].clamp(0, logits.shape[1] - 1)
        logits[rows] = negated.scatter_add_(1, index, in_columns[rows, None].float())
    return logits


def iterate_row_slices(row_count: int, slice_size: int) -> Iterator[slice]:
    """Yield slices of `slice_size` rows (at least 1) that cover `row_count` rows; the last may be shorter."""
    for start in range(0, row_count, max(1, slice_size)):
        yield slice(start, start + max(1, slice_size))
