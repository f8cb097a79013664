"""Attention of branch batches: prompt tokens see their prompt, completion tokens see their prompt and themselves.

Transformers models call the attention function that is registered under the name they were loaded with. On a GPU the
one registered here computes the packed row by `flex_attention`. Elsewhere, and with dropout, it sorts the prompts of a
branch batch into buckets of similar length. Each layer then makes two padded calls a bucket, one for its prompts and
one for their completions, and computes few query-key pairs that are masked: by `blocked_attention` on a CPU, else by
PyTorch's attention.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixpo.data.branches import BranchLengths, compute_token_indices
from mixpo.models.blocked_attention import blocked_attention
from mixpo.models.flex_attention import LEAST_WIDTH, attend_to_blocks, can_compile_kernels, make_block_mask

ATTENTION_NAME = "mixpo_branches"

FLEX_ATTENTION_DEVICES = frozenset({"cuda"} if can_compile_kernels() else ())
"""Devices on which a packed row is computed as it is, by FlexAttention's kernels; not run on a GPU yet."""
BLOCKED_ATTENTION_DEVICES = frozenset({"cpu"})
"""Devices on which `blocked_attention` is faster than PyTorch's for rows of a batch."""
BUCKET_COST_IN_PAIRS = {"cpu": 1 << 15, "cuda": 1 << 22}
"""Time of one more bucket, in query-key pairs that could be computed instead; not measured on a GPU."""
DECODING_BUCKET_COST_IN_KEYS = {"cpu": 1 << 9, "cuda": 1 << 16}
"""Time of one more bucket while decoding, in padding keys a head that could be read instead; not measured on a GPU."""


@dataclass(frozen=True)
class LengthBucket:
    """Prompts of similar length, padded to the longest, and their completions, padded likewise."""

    prompt_shape: torch.Size
    """Number of prompts, and tokens of the longest."""
    completion_shape: torch.Size
    """Likewise; (0, 0) without completions, or where every prompt has one, which is appended to it."""
    prompt_lengths: Int[Tensor, " prompts"]
    mask_biases: dict[Any, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    """Mask biases of prompts and completions by window and dtype, shared by the layers; one row for all, or one each.
    """


@dataclass(frozen=True)
class BucketLayout:
    """Index maps between the tokens of a packed row and their slots in length buckets.

    Slots are counted bucket by bucket: its prompts, flattened, then its completions.
    """

    buckets: tuple[LengthBucket, ...]
    slot_tokens: Int[Tensor, " slots"]
    """Index in the row of each slot's token; 0 for padding."""
    slot_mask: Bool[Tensor, " slots"]
    """False for padding."""
    token_slots: Int[Tensor, " length"]
    """Slot of each token of the row."""


def make_bucket_layout(branch_lengths: Sequence[BranchLengths], device: torch.device) -> BucketLayout:
    """Sort the prompts and completions of a packed row into length buckets, and map its tokens to their slots."""
    sizes = torch.tensor(branch_lengths)
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes)
    buckets, tokens, masks = [], [], []
    for rows in _group_by_length(branch_lengths, BUCKET_COST_IN_PAIRS[device.type]):
        prompts, prompt_mask = compute_token_indices(starts[rows, 0], sizes[rows, 0])
        completions, completion_mask = compute_token_indices(starts[rows, 1:].flatten(), sizes[rows, 1:].flatten())
        buckets.append(LengthBucket(prompts.shape, completions.shape, sizes[rows, 0].to(device, torch.int32)))
        tokens += [prompts.flatten(), completions.flatten()]
        masks += [prompt_mask.flatten(), completion_mask.flatten()]
    slot_tokens, slot_mask = torch.cat(tokens), torch.cat(masks)
    token_slots = torch.empty_like(slot_tokens[slot_mask])
    token_slots[slot_tokens[slot_mask]] = slot_mask.nonzero()[:, 0]
    return BucketLayout(tuple(buckets), slot_tokens.to(device), slot_mask.to(device), token_slots.to(device))


def _group_by_length(branch_lengths: Sequence[BranchLengths], bucket_cost_in_pairs: int) -> list[list[int]]:
    """Group prompts into lists of indices, longest first; a new list starts where padding would cost more."""
    buckets: list[list[int]] = []
    longest_prompt = longest_completion = 0
    for row in sorted(range(len(branch_lengths)), key=lambda row: branch_lengths[row], reverse=True):
        prompt, *completions = branch_lengths[row]
        count, k, completion = len(buckets[-1]) if buckets else 0, len(completions), max(completions, default=0)
        joined = _count_query_key_pairs(count + 1, longest_prompt, max(longest_completion, completion), k)
        separate = _count_query_key_pairs(count, longest_prompt, longest_completion, k)
        separate += _count_query_key_pairs(1, prompt, completion, k)
        if buckets and joined <= separate + bucket_cost_in_pairs:
            buckets[-1].append(row)
            longest_completion = max(longest_completion, completion)
        else:
            buckets.append([row])
            longest_prompt, longest_completion = prompt, completion
    return buckets


def _count_query_key_pairs(prompt_count: int, prompt_length: int, completion_length: int, k: int) -> int:
    """Count the query-key pairs of attention in a bucket with k completions a prompt, from the padded lengths."""
    return prompt_count * (prompt_length * prompt_length + k * completion_length * (prompt_length + completion_length))


def _make_mask_biases(bucket: LengthBucket, window: int | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Additive masks, 0 or minus infinity, of a bucket's prompts (None: causal attention) and its completions."""
    (prompts, longest_prompt), (completions, longest_completion) = bucket.prompt_shape, bucket.completion_shape
    device = bucket.prompt_lengths.device
    prompt, completion = (
        torch.arange(length, device=device, dtype=torch.int32) for length in (longest_prompt, longest_completion)
    )
    lengths = bucket.prompt_lengths.repeat_interleave(completions // prompts)[:, None, None]
    distance = torch.cat(
        [
            (lengths + completion[:, None] - prompt).masked_fill(prompt >= lengths, -1),
            (completion[:, None] - completion).expand(len(lengths), -1, -1),
        ],
        dim=2,
    )
    causal = device.type not in BLOCKED_ATTENTION_DEVICES and (window is None or window >= longest_prompt)
    prompt_bias = None if causal else _convert_distance_to_mask_bias(prompt[:, None] - prompt, window, dtype)[None]
    return prompt_bias, _convert_distance_to_mask_bias(distance, window, dtype)


def _convert_distance_to_mask_bias(
    key_distance: Int[Tensor, "*shape"], window: int | None, dtype: torch.dtype
) -> Float[Tensor, "*shape"]:
    """Additive mask: 0 where the key is at most at the query and within the window, minus infinity elsewhere."""
    visible = (key_distance >= 0) & (True if window is None else key_distance < window)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


class _GatherRows(torch.autograd.Function):
    """x[index], where each row of x is used at most once, so that the gradient is a gather too instead of a sum.

    `inverse` is the position in the result of each row of x, `used` is false for rows that are not in it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "n heads width"], index: Tensor, inverse: Tensor, used: Tensor | None
    ) -> Float[Tensor, "m heads width"]:
        ctx.save_for_backward(inverse, used)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "m heads width"]) -> tuple[Tensor | None, ...]:
        inverse, used = ctx.saved_tensors
        of_x = gradient.index_select(0, inverse)
        return of_x if used is None else of_x * used[:, None, None], None, None, None


class BranchLayout:
    """Where the prompts and completions of a packed row are, in the form that each way of attention reads."""

    def __init__(self, branch_lengths: Sequence[BranchLengths], device: torch.device) -> None:
        if all(len(row) == 2 for row in branch_lengths):  # a prompt and its one completion are one sequence
            branch_lengths = [(sum(row),) for row in branch_lengths]
        self.branch_lengths, self.device = branch_lengths, device
        self._block_masks: dict[int | None, BlockMask] = {}

    @cached_property
    def bucket_layout(self) -> BucketLayout:
        """The layout in length buckets, made once a batch."""
        return make_bucket_layout(self.branch_lengths, self.device)

    def get_block_mask(self, window: int | None) -> BlockMask:
        """The block mask of a sliding window, made once a batch."""
        if window not in self._block_masks:
            self._block_masks[window] = make_block_mask(self.branch_lengths, window, self.device)
        return self._block_masks[window]


_layout: ContextVar[BranchLayout | None] = ContextVar("layout", default=None)


@contextmanager
def use_branch_attention(branch_lengths: Sequence[BranchLengths], device: torch.device) -> Iterator[None]:
    """Context manager: model attention is that of one row with these prompts and completions; no effect if empty."""
    with _use_layout(BranchLayout(branch_lengths, device) if branch_lengths else None):
        yield


def capture_branch_attention() -> AbstractContextManager[None]:
    """Context manager: model attention is the one of this call, entered later and in any thread (checkpointing)."""
    return _use_layout(_layout.get())


@contextmanager
def _use_layout(layout: BranchLayout | None) -> Iterator[None]:
    """Context manager: model attention is that of a layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


_decoding_buckets: ContextVar[tuple[tuple[slice, int], ...] | None] = ContextVar("decoding_buckets", default=None)


@contextmanager
def use_decoding_attention(key_counts: Sequence[int], device: torch.device) -> Iterator[None]:
    """Context manager: model attention is that of one new token a row, which sees the row's first `key_counts` keys."""
    token = _decoding_buckets.set(tuple(_split_by_key_count(key_counts, DECODING_BUCKET_COST_IN_KEYS[device.type])))
    try:
        yield
    finally:
        _decoding_buckets.reset(token)


def _split_by_key_count(key_counts: Sequence[int], bucket_cost_in_keys: int) -> Iterator[tuple[slice, int]]:
    """Yield (slice of rows, most keys of a row); a new slice starts where padding would cost more than a bucket."""
    first, most, total = 0, 0, 0
    for row, count in enumerate(key_counts):
        padding = max(most, count) * (row - first + 1) - total - count
        if row > first and padding > bucket_cost_in_keys:
            yield slice(first, row), most
            first, most, total = row, 0, 0
        most, total = max(most, count), total + count
    yield slice(first, len(key_counts)), most


def _compute_attention(
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
    """Attention function registered with transformers: of a branch batch, of one new token a row, or sdpa otherwise."""
    layout = _layout.get()
    if layout is None and query.shape[2] == 1 and attention_mask is not None and kwargs.get("position_bias") is None:
        buckets = _decoding_buckets.get() or ((slice(None), key.shape[2]),)
        outputs = [
            _attend_new_tokens(
                query[rows], key[rows, :, :most], value[rows, :, :most], attention_mask[rows, ..., :most], scaling
            )
            for rows, most in buckets
        ]
        return torch.cat(outputs), None
    if layout is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    dtype = value.dtype  # rotations leave queries and keys wider than autocast
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if query.device.type in FLEX_ATTENTION_DEVICES and not dropout and query.shape[3] >= LEAST_WIDTH:
        mask = layout.get_block_mask(sliding_window)
        return attend_to_blocks(query.to(dtype), key.to(dtype), value, mask, scale), None
    bucket_layout = layout.bucket_layout
    outputs = list[Tensor]()
    split = (_split_into_buckets(x.to(dtype), bucket_layout) for x in (query, key, value))
    for bucket, (q, completion_q), (k, completion_k), (v, completion_v) in zip(
        bucket_layout.buckets, *split, strict=True
    ):
        if (sliding_window, dtype) not in bucket.mask_biases:
            bucket.mask_biases[sliding_window, dtype] = _make_mask_biases(bucket, sliding_window, dtype)
        prompt_bias, completion_bias = bucket.mask_biases[sliding_window, dtype]
        outputs.append(_attend(q, k, v, prompt_bias, scale, dropout).flatten(0, 1))
        if len(completion_q):
            per_prompt = len(completion_q) // len(q)
            keys = torch.cat([k.repeat_interleave(per_prompt, dim=0), completion_k], dim=1)
            values = torch.cat([v.repeat_interleave(per_prompt, dim=0), completion_v], dim=1)
            outputs.append(_attend(completion_q, keys, values, completion_bias, scale, dropout).flatten(0, 1))
    out: Tensor = _GatherRows.apply(  # type: ignore[no-untyped-call]
        torch.cat(outputs), bucket_layout.token_slots, bucket_layout.slot_tokens, bucket_layout.slot_mask
    )
    return out[None], None


def _attend(
    q: Float[Tensor, "rows queries heads width"],
    k: Float[Tensor, "rows keys kv_heads width"],
    v: Float[Tensor, "rows keys kv_heads value_width"],
    mask_bias: Float[Tensor, "one_or_rows queries keys"] | None,
    scale: float,
    dropout: float,
) -> Float[Tensor, "rows queries heads value_width"]:
    """softmax(scale * q k^T + mask_bias) v by the function that is faster on the device; causal without a bias."""
    if mask_bias is not None and mask_bias.device.type in BLOCKED_ATTENTION_DEVICES and not dropout:
        return blocked_attention(q, k, v, mask_bias, scale)
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), repeat_kv(k.transpose(1, 2), groups), repeat_kv(v.transpose(1, 2), groups)
    mask = None if mask_bias is None else mask_bias[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=mask is None)
    return out.transpose(1, 2)


def _attend_new_tokens(
    query: Float[Tensor, "rows heads 1 width"],
    key: Float[Tensor, "rows kv_heads keys width"],
    value: Float[Tensor, "rows kv_heads keys value_width"],
    visible: Bool[Tensor, "rows 1 1 keys"],
    scaling: float | None,
) -> Float[Tensor, "rows 1 heads value_width"]:
    """Attention of one new token a row; query heads that share keys become queries of one head, so no key is copied."""
    rows, heads, _, width = query.shape
    groups = heads // key.shape[1]
    grouped = query.to(value.dtype).view(rows, key.shape[1], groups, width)
    if groups == 1 and value.dtype == torch.bfloat16 and value.device.type == "cpu":  # one row is no matrix product
        grouped = grouped.expand(-1, -1, 2, -1)
    visible = visible.expand(-1, -1, grouped.shape[2], -1)
    out = scaled_dot_product_attention(grouped, key.to(value.dtype), value, attn_mask=visible, scale=scaling)
    return out[:, :, :groups].reshape(rows, 1, heads, -1)


def _split_into_buckets(
    x: Float[Tensor, "1 heads length width"], layout: BucketLayout
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a packed row's padded prompts and completions of each bucket, [count, longest, heads, width]."""
    flat = x.transpose(1, 2)[0]
    slots: Tensor = _GatherRows.apply(flat, layout.slot_tokens, layout.token_slots, None)  # type: ignore[no-untyped-call]
    shapes = [shape for bucket in layout.buckets for shape in (bucket.prompt_shape, bucket.completion_shape)]
    parts = slots.split([math.prod(shape) for shape in shapes])
    views = [part.view(*shape, *x.shape[1::2]) for part, shape in zip(parts, shapes, strict=True)]
    return zip(views[::2], views[1::2], strict=True)


AttentionInterface.register(ATTENTION_NAME, _compute_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
