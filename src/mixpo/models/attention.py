"""Attention of branch batches: a prompt over itself, a completion over its prompt and itself, and nothing else.

Transformers' models call whatever attention is registered under the name that they were loaded with. Ours is
PyTorch's; while a branch batch goes through the model it is called twice a layer, on all prompts under each other and
on all completions under each other, so that hardly anything is computed that no token may see.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixpo.data.branches import Span

NAME = "mixpo_branches"


@dataclass(frozen=True)
class Blocks:
    """Where the tokens of a row stand once its prompts, and its completions, lie under each other, padded."""

    prompts: torch.Size
    """How many there are, and the longest one's tokens."""
    completions: torch.Size
    """None where every prompt has one completion: both are one sequence then, and stand among the prompts."""
    lengths: Int[Tensor, " prompts"]
    order: Int[Tensor, " places"]
    """The place in the row of what stands in both blocks, flattened one behind the other; 0 for padding."""
    real: Bool[Tensor, " places"]
    """False for padding."""
    places: Int[Tensor, " length"]
    """The way back: where in the blocks each token of the row stands."""
    masks: dict[Any, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    """What every layer adds to the scores of either block, by window and precision."""


def lay_out(spans: Sequence[Span], device: torch.device) -> Blocks:
    """The blocks of a row that holds these prompts and completions."""
    whole = all(len(span.completions) == 1 for span in spans)
    pieces = [(span.prompt + span.completions[0],) if whole else (span.prompt, *span.completions) for span in spans]
    sizes = torch.tensor(pieces, device=device)
    starts = torch.tensor(list(accumulate((size for piece in pieces for size in piece), initial=0))[:-1], device=device)
    starts = starts.view_as(sizes)
    prompts, real_prompts = _padded(starts[:, 0], sizes[:, 0])
    completions, real_completions = _padded(starts[:, 1:].flatten(), sizes[:, 1:].flatten())
    real = torch.cat([real_prompts.flatten(), real_completions.flatten()])
    order = torch.cat([prompts.flatten(), completions.flatten()])
    places = torch.empty_like(order[real])
    places[order[real]] = real.nonzero()[:, 0]
    return Blocks(prompts.shape, completions.shape, sizes[:, 0], order, real, places)


def _padded(
    starts: Int[Tensor, " pieces"], sizes: Int[Tensor, " pieces"]
) -> tuple[Int[Tensor, "pieces longest"], Bool[Tensor, "pieces longest"]]:
    within = torch.arange(int(sizes.max()) if len(sizes) else 0, device=starts.device)
    real = within < sizes[:, None]
    return (starts[:, None] + within) * real, real


def _masks(blocks: Blocks, window: int | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """For prompts (None: plain causal attention), and for completions, whose keys are the prompt's, then their own."""
    (prompts, longest), (completions, longest_own) = blocks.prompts, blocks.completions
    before, own = (torch.arange(length, device=blocks.order.device) for length in (longest, longest_own))
    lengths = blocks.lengths.repeat_interleave(completions // prompts)[:, None, None]
    distance = torch.cat(
        [
            (lengths + own[:, None] - before).masked_fill(before >= lengths, -1),
            (own[:, None] - own).expand(len(lengths), -1, -1),
        ],
        dim=2,
    )
    of_prompts = None if window is None or window >= len(before) else _added(before[:, None] - before, window, dtype)
    return of_prompts, _added(distance, window, dtype)[:, None]


def _added(distance: Int[Tensor, "*shape"], window: int | None, dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """0 where a key stands at its query or before it, within the window; minus infinity elsewhere."""
    seen = (distance >= 0) & (True if window is None else distance < window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


class _Reorder(torch.autograd.Function):
    """x[to], where the rows of x that are used at all are used once: so the way back is a gather too, not a sum.

    `back` says where in the result each row of x stands, `used` whether it does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "n heads width"], to: Tensor, back: Tensor, used: Tensor | None
    ) -> Float[Tensor, "m heads width"]:
        ctx.save_for_backward(back, used)
        return x.index_select(0, to)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "m heads width"]) -> tuple[Tensor | None, ...]:
        back, used = ctx.saved_tensors
        found = gradient.index_select(0, back)
        return found if used is None else found * used[:, None, None], None, None, None


_blocks: ContextVar[Blocks | None] = ContextVar("blocks", default=None)


@contextmanager
def attending(spans: Sequence[Span], device: torch.device) -> Iterator[None]:
    """What goes through a model meanwhile is one row that holds these prompts and completions, if there are any."""
    token = _blocks.set(lay_out(spans, device) if spans else None)
    try:
        yield
    finally:
        _blocks.reset(token)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads length width"],
    key: Float[Tensor, "rows kv_heads keys width"],
    value: Float[Tensor, "rows kv_heads keys width"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "rows length heads width"], None]:
    blocks = _blocks.get()
    if blocks is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    groups, dtype = query.shape[1] // key.shape[1], value.dtype  # rotations leave queries and keys wider than autocast
    (q, own_q), (k, own_k), (v, own_v) = (_split(x.to(dtype), blocks) for x in (query, key, value))
    if (sliding_window, dtype) not in blocks.masks:
        blocks.masks[sliding_window, dtype] = _masks(blocks, sliding_window, dtype)
    mask, branch_mask = blocks.masks[sliding_window, dtype]

    def attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Float[Tensor, "pieces length heads width"]:
        k, v = repeat_kv(k.transpose(1, 2), groups), repeat_kv(v.transpose(1, 2), groups)
        return scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=added, dropout_p=dropout, scale=scaling, is_causal=added is None
        ).transpose(1, 2)

    out = attend(q, k, v, mask).flatten(0, 1)
    if len(own_q):
        times = len(own_q) // len(q)
        keys, values = (
            torch.cat([shared.repeat_interleave(times, dim=0), own], dim=1) for shared, own in ((k, own_k), (v, own_v))
        )
        out = torch.cat([out, attend(own_q, keys, values, branch_mask).flatten(0, 1)])
    return _Reorder.apply(out, blocks.places, blocks.order, blocks.real)[None], None  # type: ignore[no-untyped-call]


def _split(
    x: Float[Tensor, "1 heads length width"], blocks: Blocks
) -> tuple[Float[Tensor, "prompts longest_prompt heads width"], Float[Tensor, "completions longest heads width"]]:
    flat = x.transpose(1, 2)[0]
    reordered: Tensor = _Reorder.apply(flat, blocks.order, blocks.places, None)  # type: ignore[no-untyped-call]
    prompts, completions = reordered.split([math.prod(blocks.prompts), math.prod(blocks.completions)])
    return prompts.view(*blocks.prompts, *x.shape[1::2]), completions.view(*blocks.completions, *x.shape[1::2])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
