"""Branch batches: prompts and their k completions, the one batch format of everything but the start of sampling.

One row holds every prompt of the batch followed by its completions (branches), without padding. Positions restart
after the prompt for every branch, and a branch attends to its prompt and to itself only, so a prompt is computed once
however many completions it has.

    row       p0 p1 p2 | a0 a1 a2 | b0 b1 | q0 q1 | c0 | d0 d1
    position   0  1  2    3  4  5    3  4    0  1    2    2  3

This module alone decides where a completion starts, where it ends and where its score stands: from explicit lengths,
never from padding ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Tokens = Sequence[int]
Batch = TypeVar("Batch", "BranchBatch", "PromptBatch")


@dataclass(frozen=True)
class Span:
    """Lengths of a prompt and of its completions, which follow it in the row."""

    prompt: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class BranchBatch:
    """Prompts with k completions each, laid out in rows.

    What is read from a model's output at `source` or `last` has the shape of the completions, whatever the layout of
    the rows: both index the rows flattened to one dimension.
    """

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    completions: Int[Tensor, "prompts k tokens"]
    mask: Bool[Tensor, "prompts k tokens"]
    """True for a completion's tokens, its end token included."""
    source: Int[Tensor, "prompts k tokens"]
    """Where a completion token is predicted: the place of the token before it."""
    last: Int[Tensor, "prompts k"]
    """Where a completion's score stands: the place of its last token."""
    tokens: int
    """Tokens computed, without padding."""
    spans: tuple[Span, ...] = ()
    """What the one row holds; empty where every completion has a row of its own, padded on the right."""

    def __len__(self) -> int:
        return len(self.completions)

    def to(self, device: torch.device) -> "BranchBatch":
        """The same batch on another device."""
        return _to(self, device)


def _to(batch: Batch, device: torch.device) -> Batch:
    tensors = {name: x.to(device) for name, x in vars(batch).items() if isinstance(x, Tensor)}
    return replace(batch, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Completions:
    """k completions of each prompt, padded on the right: the layout of everything that has a number a token."""

    tokens: Int[Tensor, "prompts k tokens"]
    mask: Bool[Tensor, "prompts k tokens"]
    """True for a completion's tokens, its end token included."""

    @classmethod
    def from_lists(cls, completions: Sequence[Sequence[Tokens]]) -> "Completions":
        """Pad lists of tokens. Raises ValueError if the prompts do not all have the same number of completions."""
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
        """Tokens of each completion."""
        return self.mask.sum(dim=-1)

    def to_lists(self) -> list[list[list[int]]]:
        """The completions without padding."""
        return unpad(self.tokens, self.mask)

    def select(self, rows: Sequence[int]) -> "Completions":
        """Take the completions of some prompts, as wide as the longest of them."""
        longest = int(self.lengths[list(rows)].max())
        return Completions(self.tokens[list(rows), :, :longest], self.mask[list(rows), :, :longest])


AnyCompletions = Completions | Sequence[Sequence[Tokens]]
"""Padded tensors, as they are sampled, or lists, as they are read from rows."""


def select_completions(completions: AnyCompletions, rows: Sequence[int]) -> AnyCompletions:
    """Take the completions of some prompts."""
    if isinstance(completions, Completions):
        return completions.select(rows)
    return [completions[row] for row in rows]


def unpad(values: Tensor, mask: Bool[Tensor, "prompts k tokens"]) -> list[list[list[Any]]]:
    """The values [prompts, k, tokens] of each completion as lists, without padding."""
    rows = zip(values.tolist(), mask.sum(dim=-1).tolist(), strict=True)
    return [[row[:length] for row, length in zip(*branches, strict=True)] for branches in rows]


def pack(
    prompts: Sequence[Tokens],
    completions: AnyCompletions,
    rows: Sequence[int] | None = None,
    *,
    share_prompt: bool = True,
) -> BranchBatch:
    """Lay out prompts and their completions (k for each, none empty) as a branch batch; `rows` takes some of them.

    With `share_prompt=False` every completion has a row and a copy of the prompt of its own: the layout for models
    whose attention is not ours to choose (state-space layers). What is computed from the batch is the same.
    """
    rows = range(len(prompts)) if rows is None else rows
    selected = select_completions(completions, rows)
    chosen = selected if isinstance(selected, Completions) else Completions.from_lists(selected)
    count, k, longest = chosen.mask.shape
    sizes = chosen.lengths
    prompt_sizes = torch.tensor([len(prompts[row]) for row in rows])
    if not prompt_sizes.all() or not sizes.all():
        raise ValueError("a prompt or a completion without tokens cannot be predicted or scored")
    if share_prompt:
        pieces = torch.cat([prompt_sizes[:, None], sizes], dim=1)
        starts = (pieces.flatten().cumsum(0) - pieces.flatten()).view_as(pieces)
        prompt_starts, completion_starts = starts[:, :1], starts[:, 1:]
        height, width = 1, int(pieces.sum())
    else:
        height, width = count * k, int((prompt_sizes[:, None] + sizes).max())
        prompt_starts = (torch.arange(count * k) * width).view(count, k)
        completion_starts = prompt_starts + prompt_sizes[:, None]
    input_ids = torch.zeros(height * width, dtype=torch.long)
    position_ids = torch.arange(width).repeat(height)

    copies = prompt_starts.shape[1]
    places, real = pad_positions(prompt_starts.flatten(), prompt_sizes.repeat_interleave(copies))
    flat = [token for row in rows for _ in range(copies) for token in prompts[row]]
    input_ids[places[real]] = torch.tensor(flat)
    position_ids[places[real]] = torch.arange(places.shape[1]).expand_as(places)[real]

    within = torch.arange(longest)
    places = completion_starts[..., None] + within
    input_ids[places[chosen.mask]] = chosen.tokens[chosen.mask]
    position_ids[places[chosen.mask]] = (prompt_sizes[:, None, None] + within).expand_as(places)[chosen.mask]
    source = places - 1
    source[..., 0] = prompt_starts + prompt_sizes[:, None] - 1
    spans = zip(prompt_sizes.tolist(), sizes.tolist(), strict=True)
    return BranchBatch(
        input_ids=input_ids.view(height, width),
        position_ids=position_ids.view(height, width),
        completions=chosen.tokens,
        mask=chosen.mask,
        source=source.masked_fill(~chosen.mask, 0),
        last=completion_starts + sizes - 1,
        tokens=copies * int(prompt_sizes.sum()) + int(sizes.sum()),
        spans=tuple(Span(prompt, tuple(branches)) for prompt, branches in spans) if share_prompt else (),
    )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts alone, to be read before completions are drawn: in one row without padding, or a row each."""

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    lengths: Int[Tensor, " prompts"]
    places: Int[Tensor, "prompts longest"]
    """Where a prompt's tokens stand in the rows flattened; behind its end, anywhere."""
    spans: tuple[Span, ...] = ()

    @property
    def last(self) -> Int[Tensor, " prompts"]:
        """Where a prompt's last token stands."""
        return self.places.gather(1, self.lengths[:, None] - 1)[:, 0]

    def to(self, device: torch.device) -> "PromptBatch":
        """The same batch on another device."""
        return _to(self, device)


@dataclass(frozen=True)
class TokenBatch:
    """One new token a row, whose prompt and earlier tokens are in a cache."""

    input_ids: Int[Tensor, "rows 1"]
    position_ids: Int[Tensor, "rows 1"]
    lengths: list[int]
    """Tokens of each row, the new one included."""

    @property
    def last(self) -> Int[Tensor, " rows"]:
        """Where each row's new token stands."""
        return torch.arange(len(self.lengths), device=self.input_ids.device)


def pack_prompts(prompts: Sequence[Tokens], *, share_row: bool = True) -> PromptBatch:
    """Lay out prompts in one row, or padded on the right in a row each. Raises ValueError on an empty one."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if not lengths.all():
        raise ValueError("found a prompt without tokens; expected at least one, to predict the first token from")
    width = int(lengths.sum() if share_row else lengths.max())
    starts = lengths.cumsum(0) - lengths if share_row else torch.arange(len(prompts)) * width
    places, real = pad_positions(starts, lengths)
    within = torch.arange(places.shape[1])
    input_ids = torch.zeros(width if share_row else len(prompts) * width, dtype=torch.long)
    input_ids[places[real]] = torch.tensor([token for prompt in prompts for token in prompt])
    position_ids = torch.zeros_like(input_ids) if share_row else within.repeat(len(prompts))
    position_ids[places[real]] = within.expand_as(real)[real]
    spans = tuple(Span(len(prompt), ()) for prompt in prompts) if share_row else ()
    return PromptBatch(input_ids.view(-1, width), position_ids.view(-1, width), lengths, places, spans)


def pad_positions(
    starts: Int[Tensor, " pieces"], sizes: Int[Tensor, " pieces"]
) -> tuple[Int[Tensor, "pieces longest"], Bool[Tensor, "pieces longest"]]:
    """Where the tokens of pieces of a row stand, the pieces under each other; place 0 and false for padding."""
    within = torch.arange(int(sizes.max()) if len(sizes) else 0)
    real = within < sizes[:, None]
    return (starts[:, None] + within) * real, real


def split_into_microbatches(lengths: Sequence[int], budget: int, *, padded: bool = False) -> Iterator[list[int]]:
    """Split rows into microbatches of at most `budget` tokens, padded to the longest or not; a longer row stands alone.

    Rows of like length go together. Yields lists of row numbers; every row is in exactly one.
    """
    batch: list[int] = []
    size = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        counted = lengths[batch[0]] if batch and padded else lengths[row]
        if batch and size + counted > budget:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += counted
    if batch:
        yield batch


def row_lengths(prompts: Sequence[Tokens], completions: AnyCompletions) -> list[int]:
    """Count the tokens in the row of each prompt: the prompt and all its completions."""
    if isinstance(completions, Completions):
        sizes = completions.lengths.sum(dim=1).tolist()
    else:
        sizes = [sum(map(len, branches)) for branches in completions]
    return [len(prompt) + size for prompt, size in zip(prompts, sizes, strict=True)]
