"""Batches of prompts with k completions each, packed into one row without padding.

One row holds every prompt of the batch followed by its completions (branches). The positions of each branch continue
those of its prompt, and a branch attends to its prompt and to itself only, so a prompt is computed once for all k.

    row       p0 p1 p2 | a0 a1 a2 | b0 b1 | q0 q1 | c0 | d0 d1
    position   0  1  2    3  4  5    3  4    0  1    2    2  3

Only this module computes where a completion starts and ends and at which token its score is read: from explicit
lengths, never from padding ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Tokens = Sequence[int]


BranchLengths = tuple[int, ...]
"""Token counts of one prompt and of each of its completions, which follow the prompt in a packed row."""


@dataclass(frozen=True)
class RowBatch:
    """Model inputs of one forward pass as tensors [rows, length]: the token ids and their positions."""

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]

    def to(self, device: torch.device) -> Self:
        """A copy of the batch with all its tensors on another device."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})


@dataclass(frozen=True)
class BranchBatch(RowBatch):
    """Model inputs for prompts with k completions each: packed into one row without padding, or a row each.

    `predictor_index` and `last_token_index` index the rows flattened to one dimension, so model outputs read at them
    have the shape of the completions in either layout of the rows.
    """

    completions: Int[Tensor, "prompts k tokens"]
    mask: Bool[Tensor, "prompts k tokens"]
    """True for a completion's tokens, its end token included."""
    predictor_index: Int[Tensor, "prompts k tokens"]
    """Index of the token before each completion token, whose logits predict it; 0 for padding."""
    last_token_index: Int[Tensor, "prompts k"]
    """Index of each completion's last token, at which its score is read."""
    token_count: int
    """Number of tokens in the batch, without padding."""
    packed_lengths: tuple[BranchLengths, ...] = ()
    """Lengths of the prompts and completions of the packed row; empty if each completion has a row of its own."""

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True)
class Completions:
    """Token ids of k completions of each prompt, padded on the right, and their mask."""

    tokens: Int[Tensor, "prompts k tokens"]
    mask: Bool[Tensor, "prompts k tokens"]
    """True for a completion's tokens, its end token included."""

    @classmethod
    def from_lists(cls, completions: Sequence[Sequence[Tokens]]) -> "Completions":
        """Right-pad lists of token ids [prompt][completion]. Raises ValueError unless every prompt has equally many."""
        k = len(completions[0])
        if any(len(branches) != k for branches in completions):
            counts = sorted({*map(len, completions)})
            raise ValueError(f"every prompt needs the same number of completions; found {counts}")
        lengths = torch.tensor([[len(completion) for completion in branches] for branches in completions])
        mask = torch.arange(int(lengths.max())) < lengths[..., None]
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        flat = [token for branches in completions for completion in branches for token in completion]
        tokens[mask] = torch.tensor(flat, dtype=torch.long)
        return cls(tokens, mask)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[Tensor, "prompts k"]:
        """Token count of each completion, [prompts, k], its end token included."""
        return self.mask.sum(dim=-1)

    def to_lists(self) -> list[list[list[int]]]:
        """Token ids as nested lists [prompt][completion][token], without padding."""
        return convert_to_unpadded_lists(self.tokens, self.mask)

    def select_by_prompt(self, prompt_indices: Sequence[int]) -> "Completions":
        """Completions of the prompts at these indices, in this order, cut to the longest of them."""
        longest = int(self.lengths[list(prompt_indices)].max())
        return Completions(self.tokens[list(prompt_indices), :, :longest], self.mask[list(prompt_indices), :, :longest])


AnyCompletions = Completions | Sequence[Sequence[Tokens]]
"""Completions as padded tensors (from sampling) or as lists of token ids (from data rows)."""


def select_completions(completions: AnyCompletions, prompt_indices: Sequence[int]) -> AnyCompletions:
    """Completions of the prompts at these indices, in the form given: padded tensors or nested lists."""
    if isinstance(completions, Completions):
        return completions.select_by_prompt(prompt_indices)
    return [completions[row] for row in prompt_indices]


def convert_to_unpadded_lists(values: Tensor, mask: Bool[Tensor, "prompts k tokens"]) -> list[list[list[Any]]]:
    """Convert per-token values [prompts, k, tokens] to nested lists without the values at padding."""
    rows = zip(values.tolist(), mask.sum(dim=-1).tolist(), strict=True)
    return [[row[:length] for row, length in zip(*branches, strict=True)] for branches in rows]


def pack_branches(
    prompts: Sequence[Tokens],
    completions: AnyCompletions,
    prompt_indices: Sequence[int] | None = None,
    *,
    share_prompt: bool = True,
) -> BranchBatch:
    """Pack prompts and their k completions each into a `BranchBatch`: those at `prompt_indices`, or all if None.

    With `share_prompt=False` every completion has a row with its own copy of the prompt, for models whose attention
    cannot be restricted to branches (state-space layers). Results are the same. Raises ValueError on an empty prompt or
    completion.
    """
    prompt_indices = range(len(prompts)) if prompt_indices is None else prompt_indices
    selected = select_completions(completions, prompt_indices)
    padded = selected if isinstance(selected, Completions) else Completions.from_lists(selected)
    count, k, longest = padded.mask.shape
    lengths = padded.lengths
    prompt_lengths = torch.tensor([len(prompts[row]) for row in prompt_indices])
    if not prompt_lengths.all() or not lengths.all():
        raise ValueError("found a prompt or a completion without tokens; expected at least one token in each")
    segment_lengths = torch.cat([prompt_lengths[:, None], lengths], dim=1)
    if share_prompt:
        starts = (segment_lengths.flatten().cumsum(0) - segment_lengths.flatten()).view_as(segment_lengths)
        prompt_starts, completion_starts = starts[:, :1], starts[:, 1:]
        height, width = 1, int(segment_lengths.sum())
    else:
        height, width = count * k, int((prompt_lengths[:, None] + lengths).max())
        prompt_starts = (torch.arange(count * k) * width).view(count, k)
        completion_starts = prompt_starts + prompt_lengths[:, None]
    input_ids = torch.zeros(height * width, dtype=torch.long)
    position_ids = torch.arange(width).repeat(height)

    copies = prompt_starts.shape[1]
    index, is_token = compute_token_indices(prompt_starts.flatten(), prompt_lengths.repeat_interleave(copies))
    input_ids[index[is_token]] = torch.tensor(
        [token for row in prompt_indices for _ in range(copies) for token in prompts[row]]
    )
    position_ids[index[is_token]] = is_token.nonzero()[:, 1]

    offsets = torch.arange(longest)
    index = completion_starts[..., None] + offsets
    input_ids[index[padded.mask]] = padded.tokens[padded.mask]
    position_ids[index[padded.mask]] = (prompt_lengths[:, None, None] + offsets).expand_as(index)[padded.mask]
    predictor_index = index - 1
    predictor_index[..., 0] = prompt_starts + prompt_lengths[:, None] - 1
    return BranchBatch(
        input_ids=input_ids.view(height, width),
        position_ids=position_ids.view(height, width),
        completions=padded.tokens,
        mask=padded.mask,
        predictor_index=predictor_index.masked_fill(~padded.mask, 0),
        last_token_index=completion_starts + lengths - 1,
        token_count=copies * int(prompt_lengths.sum()) + int(lengths.sum()),
        packed_lengths=tuple(map(tuple, segment_lengths.tolist())) if share_prompt else (),
    )


@dataclass(frozen=True)
class PromptBatch(RowBatch):
    """Model inputs for prompts without completions (prefill of sampling): packed into one row, or a row each."""

    lengths: Int[Tensor, " prompts"]
    token_index: Int[Tensor, "prompts longest"]
    """Index of each prompt token in the flattened rows; arbitrary for padding."""
    packed_lengths: tuple[BranchLengths, ...] = ()

    @property
    def last_token_index(self) -> Int[Tensor, " prompts"]:
        """Index of each prompt's last token when the rows are flattened to one dimension."""
        return self.token_index.gather(1, self.lengths[:, None] - 1)[:, 0]


@dataclass(frozen=True)
class DecodingBatch(RowBatch):
    """Model inputs for one decoding step with a key-value cache: one new token per row, so `length` is 1."""

    lengths: list[int]
    """Token count of each row, cached tokens and the new one."""

    @property
    def last_token_index(self) -> Int[Tensor, " rows"]:
        """Index of each row's new token when the rows are flattened: 0, 1, 2, ..."""
        return torch.arange(len(self.lengths), device=self.input_ids.device)


def pack_prompts(prompts: Sequence[Tokens], *, share_row: bool = True) -> PromptBatch:
    """Pack prompts into one row, or right-pad them into a row each. Raises ValueError on an empty prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if not lengths.all():
        raise ValueError("found a prompt without tokens; expected at least one, to predict the first token from")
    width = int(lengths.sum() if share_row else lengths.max())
    starts = lengths.cumsum(0) - lengths if share_row else torch.arange(len(prompts)) * width
    token_index, is_token = compute_token_indices(starts, lengths)
    input_ids = torch.zeros(width if share_row else len(prompts) * width, dtype=torch.long)
    input_ids[token_index[is_token]] = torch.tensor([token for prompt in prompts for token in prompt])
    position_ids = torch.zeros_like(input_ids) if share_row else torch.arange(width).repeat(len(prompts))
    position_ids[token_index[is_token]] = is_token.nonzero()[:, 1]
    packed_lengths = tuple((len(prompt),) for prompt in prompts) if share_row else ()
    return PromptBatch(input_ids.view(-1, width), position_ids.view(-1, width), lengths, token_index, packed_lengths)


def compute_token_indices(
    segment_starts: Int[Tensor, " segments"], segment_lengths: Int[Tensor, " segments"]
) -> tuple[Int[Tensor, "segments longest"], Bool[Tensor, "segments longest"]]:
    """Indices of each segment's tokens in a flattened row, [segments, longest], padded with 0, and their mask."""
    offsets = torch.arange(int(segment_lengths.max()) if len(segment_lengths) else 0)
    is_token = offsets < segment_lengths[:, None]
    return (segment_starts[:, None] + offsets) * is_token, is_token


def split_into_microbatches(
    token_counts: Sequence[int], token_budget: int, *, count_padding: bool = False
) -> Iterator[list[int]]:
    """Yield lists of row indices, longest first, of at most `token_budget` tokens each; a longer row comes alone."""
    batch: list[int] = []
    size = 0
    for row in sorted(range(len(token_counts)), key=lambda row: -token_counts[row]):
        row_tokens = token_counts[batch[0]] if batch and count_padding else token_counts[row]
        if batch and size + row_tokens > token_budget:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row_tokens
    if batch:
        yield batch


def count_tokens_per_prompt(prompts: Sequence[Tokens], completions: AnyCompletions) -> list[int]:
    """Token count of each prompt plus all its completions, as a list."""
    if isinstance(completions, Completions):
        sizes = completions.lengths.sum(dim=1).tolist()
    else:
        sizes = [sum(map(len, branches)) for branches in completions]
    return [len(prompt) + size for prompt, size in zip(prompts, sizes, strict=True)]
