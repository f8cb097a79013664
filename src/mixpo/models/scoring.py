"""Log-probs, scores and hidden states of sets of completions, without gradients, in batches of similar length."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mixpo.data.branches import (
    AnyCompletions,
    BranchBatch,
    Completions,
    Tokens,
    count_tokens_per_prompt,
    pack_branches,
    split_into_microbatches,
)
from mixpo.data.errors import InputError
from mixpo.data.rows import Prompt
from mixpo.data.tokens import tokenize_row
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Output


def iterate_branch_batches(
    lm: LanguageModel, prompts: Sequence[Tokens], completions: AnyCompletions, token_budget: int
) -> Iterator[tuple[list[int], BranchBatch]]:
    """Yield (prompt indices, branch batch) of at most `token_budget` tokens a batch, on the model's device."""
    for rows in split_into_microbatches(count_tokens_per_prompt(prompts, completions), token_budget):
        yield rows, pack_branches(prompts, completions, rows, share_prompt=lm.shares_prompts).to(lm.device)


@torch.no_grad()
def compute_outputs(
    lm: LanguageModel, prompts: Sequence[Tokens], completions: AnyCompletions, output_name: Output, *, token_budget: int
) -> Float[Tensor, "prompts k *rest"]:
    """One output of the model, such as `scores`, for every completion, on the CPU; token axes are padded with 0.

    Of `states`, that at the last token of every completion.
    """
    lm.eval()
    parts = []
    for rows, batch in iterate_branch_batches(lm, prompts, completions, token_budget):
        output = lm(batch, output_name)
        parts.append((rows, (output[batch.last_token_index] if output_name == "states" else output).cpu()))
    if not parts:
        raise ValueError("no prompts")
    longest = max(part.shape[-1] for _, part in parts)
    result = torch.zeros(len(prompts), *parts[0][1].shape[1:-1], longest)
    for rows, part in parts:
        result[rows, ..., : part.shape[-1]] = part
    return result


def compute_token_logprobs(
    lm: LanguageModel, prompts: Sequence[Tokens], completions: AnyCompletions, *, token_budget: int
) -> Float[Tensor, "prompts k tokens"]:
    """Log-prob of every completion token in nats, [prompts, k, tokens], 0 after a completion's end."""
    return compute_outputs(lm, prompts, completions, "logprobs", token_budget=token_budget)


def compute_sequence_logprobs(
    lm: LanguageModel, prompts: Sequence[Tokens], completions: AnyCompletions, *, token_budget: int
) -> Float[Tensor, "prompts k"]:
    """Log-prob of every completion in nats, the sum over its tokens, end token included."""
    return compute_token_logprobs(lm, prompts, completions, token_budget=token_budget).sum(dim=-1)


def compute_scores(
    reward_model: LanguageModel, prompts: Sequence[Tokens], completions: AnyCompletions, *, token_budget: int
) -> Float[Tensor, "prompts k"]:
    """Reward model's score of every completion, [prompts, k]. Raises `InputError` if one is not finite."""
    scores = compute_outputs(reward_model, prompts, completions, "scores", token_budget=token_budget)
    if broken := (~scores.isfinite()).any(dim=1).nonzero().flatten().tolist():
        row = broken[0]
        start = reward_model.tokenizer.decode(prompts[row])[-60:] if reward_model.tokenizer else ""
        raise InputError(
            f"reward model: found the scores {scores[row].tolist()} for the prompt that ends with {start!r}; expected "
            "finite numbers; look at the reward model's training"
        )
    return scores


def compute_last_states(
    lm: LanguageModel, prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]], *, token_budget: int
) -> Float[Tensor, "prompts k width"]:
    """Hidden state at the last token of every completion, the input of a reward model's head; on the CPU."""
    return compute_outputs(lm, prompts, completions, "states", token_budget=token_budget)


def retokenize_for_reward(
    reward_model: LanguageModel,
    policy: LanguageModel,
    prompt_texts: Sequence[Prompt],
    prompt_tokens: Sequence[Tokens],
    completions: AnyCompletions,
) -> tuple[Sequence[Tokens], AnyCompletions]:
    """Convert prompts and completions to the reward model's tokens, through text; unchanged if tokenizers are equal.

    A completion has an end token in the result if it has one in the policy's tokens.
    """
    if reward_model.tokenization_digest == policy.tokenization_digest:
        return prompt_tokens, completions

    new_prompts, new_completions = list[Tokens](), list[list[Tokens]]()
    lists = completions.to_lists() if isinstance(completions, Completions) else completions
    for row, branches in zip(prompt_texts, lists, strict=True):
        texts = [policy.decode_completion(completion) for completion in branches]
        prompt, tokens = tokenize_row(reward_model.tokenizer, row, texts)
        ended = map(policy.has_ended, branches)
        new_prompts.append(prompt)
        new_completions.append([t if end or len(t) == 1 else t[:-1] for t, end in zip(tokens, ended, strict=True)])
    return new_prompts, new_completions
