"""Branch batches: prompts and their k completions, the one batch format of everything but the start of sampling.

One row holds every prompt of the batch followed by its completions (branches), without padding. Positions restart
after the prompt for every branch, and a branch attends to its prompt and to itself only, so a prompt is computed once
however many completions it has.

    row       p0 p1 p2 | a0 a1 a2 | b0 b1 | q0 q1 | c0 | d0 d1
    position   0  1  2    3  4  5    3  4    0  1    2    2  3

This module alone decides where a completion starts, where it ends and where its score stands: from explicit lengths,
never from padding ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

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


def pack(
    prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]], *, share_prompt: bool = True
) -> BranchBatch:
    """Lay out prompts and their completions (k for each, none empty) as a branch batch.

    With `share_prompt=False` every completion has a row and a copy of the prompt of its own: the layout for models
    whose attention is not ours to choose (state-space layers). What is computed from the batch is the same.
    """
    k = len(completions[0])
    if any(len(branches) != k for branches in completions):
        raise ValueError(f"every prompt needs the same number of completions; found {sorted({*map(len, completions)})}")
    if any(len(prompt) == 0 for prompt in prompts) or any(len(c) == 0 for branches in completions for c in branches):
        raise ValueError("a prompt or a completion without tokens cannot be predicted or scored")
    pairs = list(zip(prompts, completions, strict=True))
    if share_prompt:
        spans = tuple(Span(len(prompt), tuple(map(len, branches))) for prompt, branches in pairs)
        length, rows = sum(row_lengths(prompts, completions)), 1
    else:
        spans = ()
        length, rows = max(len(prompt) + max(map(len, branches)) for prompt, branches in pairs), len(prompts) * k
    longest = max(len(c) for branches in completions for c in branches)
    input_ids = torch.zeros(rows * length, dtype=torch.long)
    position_ids = torch.arange(length).repeat(rows)
    source = torch.zeros(len(prompts) * k, longest, dtype=torch.long)
    last = []
    place = tokens = 0
    for row, (prompt, completion) in enumerate((prompt, c) for prompt, branches in pairs for c in branches):
        if not share_prompt or row % k == 0:
            place = place if share_prompt else row * length
            prompt_end = place + len(prompt)
            input_ids[place:prompt_end] = torch.as_tensor(prompt)
            position_ids[place:prompt_end] = torch.arange(len(prompt))
            place, tokens = prompt_end, tokens + len(prompt)
        end = place + len(completion)
        input_ids[place:end] = torch.as_tensor(completion)
        position_ids[place:end] = torch.arange(len(prompt), len(prompt) + len(completion))
        source[row, : len(completion)] = torch.arange(place - 1, end - 1)
        source[row, 0] = prompt_end - 1
        last.append(end - 1)
        place, tokens = end, tokens + len(completion)

    lengths = torch.tensor([[len(c) for c in branches] for branches in completions])
    padded = torch.zeros(len(prompts), k, longest, dtype=torch.long)
    mask = torch.arange(longest) < lengths[..., None]
    padded[mask] = torch.tensor([token for branches in completions for c in branches for token in c])
    return BranchBatch(
        input_ids=input_ids.view(rows, length),
        position_ids=position_ids.view(rows, length),
        completions=padded,
        mask=mask,
        source=source.view(len(prompts), k, longest),
        last=torch.tensor(last).view(len(prompts), k),
        tokens=tokens,
        spans=spans,
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


def pack_prompts(prompts: Sequence[Tokens], *, share_row: bool = True) -> PromptBatch:
    """Lay out prompts in one row, or padded on the right in a row each. Raises ValueError on an empty one."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if not lengths.all():
        raise ValueError("found a prompt without tokens; expected at least one, to predict the first token from")
    width = int(lengths.sum() if share_row else lengths.max())
    starts = lengths.cumsum(0) - lengths if share_row else torch.arange(len(prompts)) * width
    places, real = padded_places(starts, lengths)
    within = torch.arange(places.shape[1])
    input_ids = torch.zeros(width if share_row else len(prompts) * width, dtype=torch.long)
    input_ids[places[real]] = torch.tensor([token for prompt in prompts for token in prompt])
    position_ids = torch.zeros_like(input_ids) if share_row else within.repeat(len(prompts))
    position_ids[places[real]] = within.expand_as(real)[real]
    spans = tuple(Span(len(prompt), ()) for prompt in prompts) if share_row else ()
    return PromptBatch(input_ids.view(-1, width), position_ids.view(-1, width), lengths, places, spans)


def padded_places(
    starts: Int[Tensor, " pieces"], sizes: Int[Tensor, " pieces"]
) -> tuple[Int[Tensor, "pieces longest"], Bool[Tensor, "pieces longest"]]:
    """Where the tokens of pieces of a row stand, the pieces under each other; place 0 and false for padding."""
    within = torch.arange(int(sizes.max()) if len(sizes) else 0)
    real = within < sizes[:, None]
    return (starts[:, None] + within) * real, real


def by_tokens(lengths: Sequence[int], budget: int, *, padded: bool = False) -> Iterator[list[int]]:
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


def row_lengths(prompts: Iterable[Tokens], completions: Iterable[Sequence[Tokens]]) -> list[int]:
    """Tokens in the row of each prompt: the prompt and all its completions."""
    return [len(prompt) + sum(map(len, branches)) for prompt, branches in zip(prompts, completions, strict=True)]
