"""Attention of branch batches: a prompt over itself, a completion over its prompt and itself, and nothing else.

Transformers' models call whatever attention is registered under the name that they were loaded with. While a branch
batch goes through the model, ours computes twice a bucket in every layer: its prompts under each other, and their
completions under each other, so that hardly anything is computed that no token may see: with PyTorch's attention on a
GPU or under dropout, with our own on a CPU.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixpo.data.branches import Span, pad_positions
from mixpo.models.blocked_attention import blocked_attention

NAME = "mixpo_branches"


OURS = frozenset({"cpu"})
"""Devices on which our own attention is faster than PyTorch's for rows of a batch."""
APART = {"cpu": 1 << 15, "cuda": 1 << 22}
"""Pairs of a query and a key that take as long as the calls that another bucket costs; a GPU's is a guess."""
APART_DECODING = {"cpu": 1 << 9, "cuda": 1 << 16}
"""Keys of padding that are read, a head, while the calls of another bucket of new tokens are made; likewise."""


@dataclass(frozen=True)
class Bucket:
    """Prompts of like length under each other, padded, and their completions likewise."""

    prompts: torch.Size
    """How many there are, and the longest one's tokens."""
    completions: torch.Size
    """(0, 0) where there are none, or every prompt has one: both are one sequence then, and stand among the prompts."""
    lengths: Int[Tensor, " prompts"]
    masks: dict[Any, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    """What every layer adds to the scores of either, by window and precision: a row for all, or one each."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a row stand once they are in buckets: each its prompts, flattened, then its completions."""

    buckets: tuple[Bucket, ...]
    order: Int[Tensor, " places"]
    """The place in the row of what stands in the buckets; 0 for padding."""
    real: Bool[Tensor, " places"]
    """False for padding."""
    places: Int[Tensor, " length"]
    """The way back: where in the buckets each token of the row stands."""


def lay_out_buckets(spans: Sequence[Span], device: torch.device) -> Layout:
    """The buckets of a row that holds these prompts and completions; made on the CPU, then moved."""
    whole = all(len(span.completions) == 1 for span in spans)
    pieces = [(span.prompt + span.completions[0],) if whole else (span.prompt, *span.completions) for span in spans]
    sizes = torch.tensor(pieces)
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes)
    buckets, orders, reals = [], [], []
    for rows in _alike(pieces, APART[device.type]):
        prompts, real_prompts = pad_positions(starts[rows, 0], sizes[rows, 0])
        completions, real_completions = pad_positions(starts[rows, 1:].flatten(), sizes[rows, 1:].flatten())
        buckets.append(Bucket(prompts.shape, completions.shape, sizes[rows, 0].to(device, torch.int32)))
        orders += [prompts.flatten(), completions.flatten()]
        reals += [real_prompts.flatten(), real_completions.flatten()]
    order, real = torch.cat(orders), torch.cat(reals)
    places = torch.empty_like(order[real])
    places[order[real]] = real.nonzero()[:, 0]
    return Layout(tuple(buckets), order.to(device), real.to(device), places.to(device))


def _alike(pieces: Sequence[tuple[int, ...]], apart: int) -> list[list[int]]:
    """Prompts, the longest first, cut into buckets where padding would cost more than another bucket does."""
    buckets: list[list[int]] = []
    longest = own = 0
    for row in sorted(range(len(pieces)), key=lambda row: pieces[row], reverse=True):
        prompt, *completions = pieces[row]
        count, branches, widest = len(buckets[-1]) if buckets else 0, len(completions), max(completions, default=0)
        joined = _pairs(count + 1, longest, max(own, widest), branches)
        separate = _pairs(count, longest, own, branches) + _pairs(1, prompt, widest, branches)
        if buckets and joined <= separate + apart:
            buckets[-1].append(row)
            own = max(own, widest)
        else:
            buckets.append([row])
            longest, own = prompt, widest
    return buckets


def _pairs(count: int, longest: int, own: int, branches: int) -> int:
    """Pairs of a query and a key in a bucket of so many prompts, with so many completions each."""
    return count * (longest * longest + branches * own * (longest + own))


def _masks(bucket: Bucket, window: int | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """For prompts (None: plain causal attention), and for completions, whose keys are the prompt's, then their own."""
    (prompts, longest), (completions, longest_own) = bucket.prompts, bucket.completions
    device = bucket.lengths.device
    before, own = (torch.arange(length, device=device, dtype=torch.int32) for length in (longest, longest_own))
    lengths = bucket.lengths.repeat_interleave(completions // prompts)[:, None, None]
    distance = torch.cat(
        [
            (lengths + own[:, None] - before).masked_fill(before >= lengths, -1),
            (own[:, None] - own).expand(len(lengths), -1, -1),
        ],
        dim=2,
    )
    plain = device.type not in OURS and (window is None or window >= longest)
    of_prompts = None if plain else _added(before[:, None] - before, window, dtype)[None]
    return of_prompts, _added(distance, window, dtype)


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


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def branch_attention(spans: Sequence[Span], device: torch.device) -> Iterator[None]:
    """What goes through a model meanwhile is one row that holds these prompts and completions, if there are any."""
    token = _layout.set(lay_out_buckets(spans, device) if spans else None)
    try:
        yield
    finally:
        _layout.reset(token)


_buckets: ContextVar[tuple[tuple[slice, int], ...] | None] = ContextVar("buckets", default=None)


@contextmanager
def decoding_attention(keys: Sequence[int], device: torch.device) -> Iterator[None]:
    """What goes through a model meanwhile is one new token a row; each may see the first so many keys, and itself is
    the last of them. Rows of like length follow each other."""
    token = _buckets.set(tuple(_of_like_length(keys, APART_DECODING[device.type])))
    try:
        yield
    finally:
        _buckets.reset(token)


def _of_like_length(keys: Sequence[int], apart: int) -> Iterator[tuple[slice, int]]:
    """Rows that are attended to together, and the most keys that one of them sees."""
    first, most, total = 0, 0, 0
    for row, own in enumerate(keys):
        padding = max(most, own) * (row - first + 1) - total - own
        if row > first and padding > apart:
            yield slice(first, row), most
            first, most, total = row, 0, 0
        most, total = max(most, own), total + own
    yield slice(first, len(keys)), most


def _attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads length width"],
    key: Float[Tensor, "rows kv_heads keys width"],
    value: Float[Tensor, "rows kv_heads keys value_width"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "rows length heads value_width"], None]:
    layout = _layout.get()
    if layout is None and query.shape[2] == 1 and attention_mask is not None and kwargs.get("position_bias") is None:
        buckets = _buckets.get() or ((slice(None), key.shape[2]),)
        found_in = [
            _decode(query[rows], key[rows, :, :most], value[rows, :, :most], attention_mask[rows, ..., :most], scaling)
            for rows, most in buckets
        ]
        return torch.cat(found_in), None
    if layout is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    dtype = value.dtype  # rotations leave queries and keys wider than autocast
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    found_in = list[Tensor]()
    split = (_split(x.to(dtype), layout) for x in (query, key, value))
    for bucket, (q, own_q), (k, own_k), (v, own_v) in zip(layout.buckets, *split, strict=True):
        if (sliding_window, dtype) not in bucket.masks:
            bucket.masks[sliding_window, dtype] = _masks(bucket, sliding_window, dtype)
        mask, own_mask = bucket.masks[sliding_window, dtype]
        found_in.append(_attend(q, k, v, mask, scale, dropout).flatten(0, 1))
        if len(own_q):
            times = len(own_q) // len(q)
            keys = torch.cat([k.repeat_interleave(times, dim=0), own_k], dim=1)
            values = torch.cat([v.repeat_interleave(times, dim=0), own_v], dim=1)
            found_in.append(_attend(own_q, keys, values, own_mask, scale, dropout).flatten(0, 1))
    out: Tensor = _Reorder.apply(torch.cat(found_in), layout.places, layout.order, layout.real)  # type: ignore[no-untyped-call]
    return out[None], None


def _attend(
    q: Float[Tensor, "rows queries heads width"],
    k: Float[Tensor, "rows keys kv_heads width"],
    v: Float[Tensor, "rows keys kv_heads value_width"],
    added: Float[Tensor, "one_or_rows queries keys"] | None,
    scale: float,
    dropout: float,
) -> Float[Tensor, "rows queries heads value_width"]:
    if added is not None and added.device.type in OURS and not dropout:
        return blocked_attention(q, k, v, added, scale)
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), repeat_kv(k.transpose(1, 2), groups), repeat_kv(v.transpose(1, 2), groups)
    mask = None if added is None else added[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=added is None)
    return out.transpose(1, 2)


def _decode(
    query: Float[Tensor, "rows heads 1 width"],
    key: Float[Tensor, "rows kv_heads keys width"],
    value: Float[Tensor, "rows kv_heads keys value_width"],
    visible: Bool[Tensor, "rows 1 1 keys"],
    scaling: float | None,
) -> Float[Tensor, "rows 1 heads value_width"]:
    """One new token a row: the heads that share keys are queries of one head, so that keys are read, not copied."""
    rows, heads, _, width = query.shape
    groups = heads // key.shape[1]
    grouped = query.to(value.dtype).view(rows, key.shape[1], groups, width)
    if groups == 1 and value.dtype == torch.bfloat16 and value.device.type == "cpu":  # one row is no matrix product
        grouped = grouped.expand(-1, -1, 2, -1)
    visible = visible.expand(-1, -1, grouped.shape[2], -1)
    out = scaled_dot_product_attention(grouped, key.to(value.dtype), value, attn_mask=visible, scale=scaling)
    return out[:, :, :groups].reshape(rows, 1, heads, -1)


def _split(x: Float[Tensor, "1 heads length width"], layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
    """For every bucket, [prompts, longest, heads, width] and [completions, longest, heads, width]."""
    flat = x.transpose(1, 2)[0]
    reordered: Tensor = _Reorder.apply(flat, layout.order, layout.places, None)  # type: ignore[no-untyped-call]
    shapes = [shape for bucket in layout.buckets for shape in (bucket.prompts, bucket.completions)]
    parts = reordered.split([math.prod(shape) for shape in shapes])
    views = [part.view(*shape, *x.shape[1::2]) for part, shape in zip(parts, shapes, strict=True)]
    return zip(views[::2], views[1::2], strict=True)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
