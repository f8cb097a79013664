"""Whole sets of completions through a frozen model: sequence log-probs and scores, in portions of like length."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mixpo.data.branches import BranchBatch, Tokens, by_tokens, pack, row_lengths
from mixpo.data.errors import InputError
from mixpo.data.rows import Prompt
from mixpo.data.tokens import tokenize_row
from mixpo.models.language_model import LanguageModel, Output
from mixpo.models.loading import same_tokens

Completions = Sequence[Sequence[Tokens]]


def portions(
    lm: LanguageModel, prompts: Sequence[Tokens], completions: Completions, token_budget: int
) -> Iterator[tuple[list[int], BranchBatch]]:
    """Branch batches of at most `token_budget` tokens, each with the numbers of its prompts, on the model's device."""
    for rows in by_tokens(row_lengths(prompts, completions), token_budget):
        batch = pack([prompts[row] for row in rows], [completions[row] for row in rows], share_prompt=lm.shares_prompts)
        yield rows, batch.to(lm.device)


@torch.no_grad()
def read_all(
    lm: LanguageModel,
    prompts: Sequence[Tokens],
    completions: Completions,
    output: Output,
    *,
    token_budget: int,
) -> Float[Tensor, "prompts k *rest"]:
    """Compute an output of the model for every completion, on the CPU; token axes are padded with 0."""
    longest = max(len(c) for branches in completions for c in branches)
    result: Tensor | None = None
    lm.eval()
    for rows, batch in portions(lm, prompts, completions, token_budget):
        found = lm(batch, output).cpu()
        if result is None:
            width = (longest,) if found.ndim == 3 else ()
            result = torch.zeros(len(prompts), found.shape[1], *width)
        if found.ndim == 3:
            result[rows, :, : found.shape[2]] = found
        else:
            result[rows] = found
    if result is None:
        raise ValueError("no prompts")
    return result


def token_logprobs(
    lm: LanguageModel, prompts: Sequence[Tokens], completions: Completions, *, token_budget: int
) -> Float[Tensor, "prompts k tokens"]:
    """Log-prob of every completion token in nats, 0 behind a completion's end."""
    return read_all(lm, prompts, completions, "logprobs", token_budget=token_budget)


def sequence_logprobs(
    lm: LanguageModel, prompts: Sequence[Tokens], completions: Completions, *, token_budget: int
) -> Float[Tensor, "prompts k"]:
    """Log-prob of every completion in nats, its end token included."""
    return token_logprobs(lm, prompts, completions, token_budget=token_budget).sum(dim=-1)


def scores(
    reward: LanguageModel, prompts: Sequence[Tokens], completions: Completions, *, token_budget: int
) -> Float[Tensor, "prompts k"]:
    """The reward model's score of every completion. Raises `InputError` if one is not a finite number."""
    found = read_all(reward, prompts, completions, "scores", token_budget=token_budget)
    if broken := (~found.isfinite()).any(dim=1).nonzero().flatten().tolist():
        row = broken[0]
        start = reward.tokenizer.decode(prompts[row])[-60:] if reward.tokenizer else ""
        raise InputError(
            f"reward model: found the scores {found[row].tolist()} for the prompt that ends with {start!r}; expected "
            "finite numbers; look at the reward model's training"
        )
    return found


@torch.no_grad()
def last_states(
    lm: LanguageModel, prompts: Sequence[Tokens], completions: Completions, *, token_budget: int
) -> Float[Tensor, "prompts k width"]:
    """The hidden state at the last token of every completion, which a reward model's head reads; on the CPU."""
    width = lm.model.config.get_text_config().hidden_size
    states = torch.zeros(len(prompts), len(completions[0]), width)
    lm.eval()
    for rows, batch in portions(lm, prompts, completions, token_budget):
        states[rows] = lm(batch, "states")[batch.last].float().cpu()
    return states


def retokenised(
    reward: LanguageModel,
    policy: LanguageModel,
    rows: Sequence[Prompt],
    prompts: Sequence[Tokens],
    completions: Completions,
) -> tuple[Sequence[Tokens], Completions]:
    """Prompts and completions in the reward model's tokens: as they are where the tokenizers agree, else from text.

    A completion that ended keeps an end token, one that was cut off does not get one.
    """
    if same_tokens(reward.tokenizer, policy.tokenizer):
        return prompts, completions

    again: list[tuple[Tokens, list[Tokens]]] = []
    for row, branches in zip(rows, completions, strict=True):
        texts = [policy.read_text(completion) for completion in branches]
        prompt, tokens = tokenize_row(reward.tokenizer, row, texts, limit=1 << 30)
        ended = map(policy.has_ended, branches)
        again.append((prompt, [t if end or len(t) == 1 else t[:-1] for t, end in zip(tokens, ended, strict=True)]))
    return [prompt for prompt, _ in again], [branches for _, branches in again]
