"""Attention of branch batches on a GPU, by PyTorch's FlexAttention (Dong et al. 2024): a packed row as it is.

A block mask, made once a batch from the lengths, says which blocks of 128 by 128 query-key pairs are computed at all,
and which of them without a mask. Nothing is padded or copied, and no mask has an entry for every pair of tokens.
Not run on a GPU yet: masks, outputs and gradients are tested on a CPU, where the kernels are PyTorch's reference.
"""

import functools
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mixpo.data.branches import BranchLengths

BLOCK_TOKENS = 128
"""Queries, and keys, of a block of the mask."""
LEAST_WIDTH = 16
"""Narrowest head that the kernels compute."""


@functools.cache
def can_compile_kernels() -> bool:
    """True if Triton is installed and finds the C compiler that it needs."""
    return find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))


def make_block_mask(branch_lengths: Sequence[BranchLengths], window: int | None, device: torch.device) -> BlockMask:
    """Block mask of a packed row: a token sees its prompt and its own completion, up to itself, within the window."""
    lengths = np.array([length for row in branch_lengths for length in row])
    segments = np.repeat(np.arange(len(lengths)), lengths)
    first_segments = np.cumsum([0, *map(len, branch_lengths[:-1])])
    prompts = np.repeat(np.repeat(first_segments, [len(row) for row in branch_lengths]), lengths)
    offsets = np.arange(len(segments)) - (np.cumsum(lengths) - lengths)[segments]
    positions = np.where(segments == prompts, offsets, offsets + lengths[prompts])
    if window is not None and window > positions.max():
        window = None
    visible, full = _find_blocks(branch_lengths, window)
    segment, prompt, position = (torch.from_numpy(x).to(device, torch.int32) for x in (segments, prompts, positions))

    def is_visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """True where the key at one index of the row is visible to the query at another."""
        same = (segment[key] == segment[query]) | (segment[key] == prompt[query])
        visible = same & (query >= key)
        return visible if window is None else visible & (position[query] - position[key] < window)

    masked_blocks, full_blocks = _list_key_blocks(visible & ~full, device), _list_key_blocks(full, device)
    return BlockMask.from_kv_blocks(
        *masked_blocks,
        *full_blocks,
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=is_visible,
        seq_lengths=(len(segments), len(segments)),
    )


def _find_blocks(
    branch_lengths: Sequence[BranchLengths], window: int | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which blocks [query blocks, key blocks] have a visible pair, and in which all pairs are visible."""
    count = -(-sum(map(sum, branch_lengths)) // BLOCK_TOKENS)
    visible, full = np.zeros((2, count, count), dtype=bool)
    for queries, keys, distance in _iterate_visible_segments(branch_lengths):
        (first_q, last_q), (first_k, last_k) = (_clip_to_blocks(tokens, count) for tokens in (queries, keys))
        touched = (first_q <= last_q)[:, None] & (first_k <= last_k)
        covered = (last_q - first_q == BLOCK_TOKENS - 1)[:, None] & (last_k - first_k == BLOCK_TOKENS - 1)
        if window is not None:
            touched &= first_q[:, None] - last_k + distance < window
            covered &= last_q[:, None] - first_k + distance < window
        visible |= touched
        full |= covered
    return np.tril(visible), np.tril(full, -1)


def _iterate_visible_segments(branch_lengths: Sequence[BranchLengths]) -> Iterator[tuple[range, range, int]]:
    """Yield the tokens of a prompt or completion, those of one that it sees, and what is added to their distance."""
    start = 0
    for prompt_length, *completion_lengths in branch_lengths:
        prompt = range(start, start + prompt_length)
        yield prompt, prompt, 0
        start = prompt.stop
        for length in completion_lengths:
            completion = range(start, start + length)
            yield completion, prompt, prompt.stop - start
            yield completion, completion, 0
            start = completion.stop


def _clip_to_blocks(tokens: range, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last token in each block of a row of `count` blocks; the first lies behind the last where none is."""
    starts = np.arange(count) * BLOCK_TOKENS
    return np.maximum(starts, tokens.start), np.minimum(starts + BLOCK_TOKENS, tokens.stop) - 1


def _list_key_blocks(blocks: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of key blocks of each query block, and their indices, in the form of `BlockMask`."""
    order = np.argsort(~blocks, axis=1, kind="stable")
    count, indices = (torch.from_numpy(x)[None, None].to(device, torch.int32) for x in (blocks.sum(axis=1), order))
    return count, indices


@functools.cache
def _get_attention_function(device_type: str) -> Any:
    """FlexAttention, compiled for rows of any length on a GPU; on a CPU, as its reference computes it."""
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def attend_to_blocks(
    query: Float[Tensor, "1 heads length width"],
    key: Float[Tensor, "1 kv_heads length width"],
    value: Float[Tensor, "1 kv_heads length value_width"],
    block_mask: BlockMask,
    scale: float,
) -> Float[Tensor, "1 length heads value_width"]:
    """softmax(scale * query key^T) value over the pairs that the block mask shows."""
    attend = _get_attention_function(query.device.type)
    out: Tensor = attend(
        query,
        key,
        value,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # one kernel for short rows, too
    )
    return out.transpose(1, 2)
