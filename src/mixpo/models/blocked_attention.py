"""Attention on a CPU: for every block of queries one matrix product with the keys up to its end.

PyTorch's own takes twice the time for it, forward and backward, on short rows and in bfloat16. Like it, this keeps no
probabilities for the backward pass (Dao et al. 2022), and queries that share keys are rows of one product.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 128
"""Queries of a block: what they may not see of the block's own keys is computed in vain."""
SCORES = 1 << 22
"""Scores held at once, about."""


def blocked_attention(
    query: Float[Tensor, "rows queries heads width"],
    key: Float[Tensor, "rows keys kv_heads width"],
    value: Float[Tensor, "rows keys kv_heads value_width"],
    added: Float[Tensor, "one_or_rows queries keys"],
    scale: float,
) -> Float[Tensor, "rows queries heads value_width"]:
    """softmax(scale * query key^T + added) value. The last keys are the queries' own: later ones are not looked at."""
    rows, queries, _, width = query.shape
    grouped = query.view(rows, queries, key.shape[2], -1, width).permute(0, 2, 3, 1, 4)
    out: Tensor = _BlockedAttention.apply(  # type: ignore[no-untyped-call]
        grouped.contiguous(), key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous(), added, scale
    )
    return out.permute(0, 3, 1, 2, 4).reshape(*query.shape[:3], -1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "rows kv_heads groups queries width"],
        key: Float[Tensor, "rows kv_heads keys width"],
        value: Float[Tensor, "rows kv_heads keys value_width"],
        added: Tensor,
        scale: float,
    ) -> Float[Tensor, "rows kv_heads groups queries value_width"]:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for block in _blocks(query, key):
            (q, k, v), shape = _of_block(query, key, value, block)
            out[_queries(block)] = torch.bmm(_probabilities(q, k, added, scale, block, shape), v).view(*shape[:-1], -1)
        ctx.save_for_backward(query, key, value, out, added)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_out: Float[Tensor, "rows kv_heads groups queries value_width"]
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, added = ctx.saved_tensors
        inner = (of_out * out).sum(dim=-1, keepdim=True)
        of_query = torch.empty_like(query)
        wide = torch.promote_types(key.dtype, torch.float32)
        of_key, of_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        for block in _blocks(query, key):
            (q, k, v), shape = _of_block(query, key, value, block)
            of_o, inner_o = (x[_queries(block)].reshape(*q.shape[:2], -1) for x in (of_out, inner))
            probabilities = _probabilities(q, k, added, ctx.scale, block, shape)
            of_scores = torch.bmm(of_o, v.transpose(1, 2)).sub_(inner_o).mul_(probabilities)
            of_query[_queries(block)] = torch.bmm(of_scores, k).mul_(ctx.scale).view(shape)
            rows, _, end = block
            of_k, of_v = of_key[rows, :, :end], of_value[rows, :, :end]
            of_k += torch.bmm(of_scores.transpose(1, 2), q).mul_(ctx.scale).view_as(of_k)
            of_v += torch.bmm(probabilities.transpose(1, 2), of_o).view_as(of_v)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


Block = tuple[slice, slice, int]
"""Rows, queries, and the number of keys that these may see."""


def _blocks(query: Tensor, key: Tensor) -> Iterator[Block]:
    rows, kv_heads, groups, queries, _ = query.shape
    keys = key.shape[2]
    together = max(1, SCORES // (kv_heads * groups * min(queries, QUERIES) * keys))
    for row in range(0, rows, together):
        for first in range(0, queries, QUERIES):
            last = min(queries, first + QUERIES)
            yield slice(row, row + together), slice(first, last), keys - queries + last


def _queries(block: Block) -> tuple[slice, ...]:
    rows, queries, _ = block
    return rows, slice(None), slice(None), queries


def _of_block(query: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[tuple[Tensor, ...], torch.Size]:
    """Queries, keys and values of a block, a matrix a row and key head; and the queries' shape before that."""
    rows, _, end = block
    q = query[_queries(block)]
    return (
        q.flatten(0, 1).flatten(1, 2),
        key[rows, :, :end].flatten(0, 1),
        value[rows, :, :end].flatten(0, 1),
    ), q.shape


def _probabilities(q: Tensor, k: Tensor, added: Tensor, scale: float, block: Block, shape: torch.Size) -> Tensor:
    (rows, queries, end), whole = block, slice(None)
    added = added[whole if len(added) == 1 else rows, None, None, queries, :end].expand(*shape[:4], -1)
    scores = added.clone(memory_format=torch.contiguous_format).view(*q.shape[:2], -1)
    return scores.baddbmm_(q, k.transpose(1, 2), alpha=scale).softmax(dim=-1)
