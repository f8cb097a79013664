"""Branch batches: a prompt and its k completions, the one batch format of everything that is done to a model.

A row holds a prompt followed by its completions (branches). Positions restart after the prompt for every branch, and a
branch attends to the prompt and to itself only, so the prompt is computed once however many completions it has.

    row       p0 p1 p2 | a0 a1 a2 | b0 b1 | padding
    position   0  1  2    3  4  5    3  4
    branch     0  0  0    1  1  1    2  2    -1

This module alone decides where a completion starts, where it ends and where its score stands: from explicit lengths,
never from padding ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Tokens = Sequence[int]


@dataclass(frozen=True)
class BranchBatch:
    """Prompts with k completions each, laid out in rows.

    What is read from a model's output at `source` or `last` has the shape of the completions, whatever the layout of
    the rows: both index the rows flattened to one dimension.
    """

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    branch: Int[Tensor, "rows length"]
    """0 for the prompt, 1 to k for its completions, -1 for padding."""
    completions: Int[Tensor, "prompts k tokens"]
    mask: Bool[Tensor, "prompts k tokens"]
    """True for a completion's tokens, its end token included."""
    source: Int[Tensor, "prompts k tokens"]
    """Where a completion token is predicted: the place of the token before it."""
    last: Int[Tensor, "prompts k"]
    """Where a completion's score stands: the place of its last token."""

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def tokens(self) -> int:
        """Tokens computed, without padding."""
        return int((self.branch >= 0).sum())

    @property
    def is_plain(self) -> bool:
        """Whether every row is one ordinary sequence, for which causal attention is enough."""
        return int(self.branch.max()) <= 1

    def attends(self, window: int | None = None) -> Bool[Tensor, "rows 1 length length"]:
        """Which token (third axis) attends to which (fourth axis): to its prompt and to its own branch, backwards.

        With a window only to the last `window` positions, as sliding-window attention does.
        """
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        length = self.branch.shape[1]
        backwards = torch.ones(length, length, dtype=torch.bool, device=self.branch.device).tril()
        allowed = backwards & ((key == query) | (key == 0))
        if window is not None:
            allowed &= self.position_ids[:, :, None] - self.position_ids[:, None, :] < window
        return allowed[:, None]

    def to(self, device: torch.device) -> "BranchBatch":
        """The same batch on another device."""
        return BranchBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack(
    prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]], *, share_prompt: bool = True
) -> BranchBatch:
    """Lay out prompts and their completions (k for each, none empty) as a branch batch.

    With `share_prompt=False` every completion has a row and a copy of the prompt of its own: the layout for models
    whose attention cannot be masked (state-space layers). What is computed from the batch is the same.
    """
    k = len(completions[0])
    if any(len(branches) != k for branches in completions):
        raise ValueError(f"every prompt needs the same number of completions; found {sorted({*map(len, completions)})}")
    if any(len(prompt) == 0 for prompt in prompts) or any(len(c) == 0 for branches in completions for c in branches):
        raise ValueError("a prompt or a completion without tokens cannot be predicted or scored")
    if share_prompt:
        rows = [(prompt, branches) for prompt, branches in zip(prompts, completions, strict=True)]
    else:
        rows = [(prompt, [c]) for prompt, branches in zip(prompts, completions, strict=True) for c in branches]
    length = max(len(prompt) + sum(map(len, branches)) for prompt, branches in rows)
    longest = max(len(c) for branches in completions for c in branches)

    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    position_ids = torch.arange(length).repeat(len(rows), 1)
    branch = torch.full((len(rows), length), -1)
    source, last = [], []
    for row, (prompt, branches) in enumerate(rows):
        input_ids[row, : len(prompt)] = torch.as_tensor(prompt)
        branch[row, : len(prompt)] = 0
        starts = list(accumulate((len(c) for c in branches), initial=len(prompt)))
        for number, (completion, start) in enumerate(zip(branches, starts, strict=False), start=1):
            end = start + len(completion)
            input_ids[row, start:end] = torch.as_tensor(completion)
            position_ids[row, start:end] = torch.arange(len(prompt), len(prompt) + len(completion))
            branch[row, start:end] = number
            places = torch.zeros(longest, dtype=torch.long)
            places[: len(completion)] = torch.arange(start - 1, end - 1)
            places[0] = len(prompt) - 1
            source.append(places + row * length)
            last.append(row * length + end - 1)

    lengths = torch.tensor([[len(c) for c in branches] for branches in completions])
    padded = torch.zeros(len(prompts), k, longest, dtype=torch.long)
    mask = torch.arange(longest) < lengths[..., None]
    padded[mask] = torch.tensor([token for branches in completions for c in branches for token in c])
    return BranchBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        branch=branch,
        completions=padded,
        mask=mask,
        source=torch.stack(source).view(len(prompts), k, longest),
        last=torch.tensor(last).view(len(prompts), k),
    )


def by_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Split rows into microbatches of at most `budget` tokens, padding included; a longer row stands alone.

    Rows of like length go together. Yields lists of row numbers; every row is in exactly one.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def row_lengths(prompts: Iterable[Tokens], completions: Iterable[Sequence[Tokens]]) -> list[int]:
    """Tokens in the row of each prompt: the prompt and all its completions."""
    return [len(prompt) + sum(map(len, branches)) for prompt, branches in zip(prompts, completions, strict=True)]
