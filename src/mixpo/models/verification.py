"""Verification that mixpo computes the same outputs from a loaded model as transformers does."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixpo.data.branches import pack_branches
from mixpo.data.errors import InputError
from mixpo.models.language_model import LanguageModel
from mixpo.models.reward_heads import find_score_head
from mixpo.models.sampling import sample_completions


@torch.no_grad()
def verify_model(lm: LanguageModel, folder: Path, probe: list[int], expected_outputs: tuple[Tensor, Tensor]) -> None:
    """Check a model's outputs and samples against transformers', and set `lm.shares_prompts`; raises `InputError`.

    Sets `lm.shares_prompts` to False if completions that share a row compute something else than in their own rows.
    """
    prompts, completions = ([probe[:5], probe[:3]], [[probe[5:8], probe[8:12]], [probe[4:9], probe[9:11]]])
    shared = pack_branches(prompts, completions).to(lm.device)
    separate = pack_branches(prompts, completions, share_prompt=False).to(lm.device)
    states, logits = expected_outputs
    hidden = lm(separate, "states")
    if not _are_close(hidden[separate.last_token_index][0, 1], states[-1]):
        raise InputError(
            f"{folder}: found a {type(lm.model).__name__} whose attention is not a softmax of scaled products (capped, "
            "perhaps, or with sinks); expected plain attention; this architecture is not supported"
        )
    lm.shares_prompts = _are_close(lm(shared, "states")[shared.last_token_index], hidden[separate.last_token_index])
    if lm.model.get_output_embeddings() is None:
        find_score_head(lm.model, folder)
        if not _are_close(lm(separate, "scores")[0, 1], logits[0]):
            raise InputError(
                f"{folder}: found a {type(lm.model).__name__} whose score is not a linear map of the last token's "
                "hidden state; expected a plain head; this architecture is not supported"
            )
        return
    logprobs = lm(separate, "logprobs")[0, 1, :4]
    plain = logits[4:8].log_softmax(dim=-1).gather(1, torch.tensor(probe[8:12], device=lm.device)[:, None])[:, 0]
    if not _are_close(logprobs, plain):
        raise InputError(
            f"{folder}: found a {type(lm.model).__name__} whose logits are not a linear map of its last hidden state "
            "(scaled or capped logits, perhaps); expected a plain output head; this architecture is not supported yet"
        )
    sampled = sample_completions(lm, prompts, k=2, max_tokens=4, seed=0)
    batch = pack_branches(prompts, sampled, share_prompt=lm.shares_prompts).to(lm.device)
    if not _are_close(lm(batch, "logprobs").cpu(), sampled.logprobs):
        raise InputError(
            f"{folder}: found a {type(lm.model).__name__}, which draws completions from another distribution than it "
            "computes, since its attention is its own; expected attention that can be chosen"
        )


def draw_probe_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Draw twelve random token ids to verify a model with, always the same ones, without its pad token."""
    text = model.config.get_text_config()
    random_tokens = torch.randint(
        min(len(tokenizer), text.vocab_size), (64,), generator=torch.Generator().manual_seed(0)
    )
    return [token for token in random_tokens.tolist() if token != text.pad_token_id][:12]


@torch.no_grad()
def compute_reference_outputs(model: PreTrainedModel, probe_tokens: list[int]) -> tuple[Tensor, Tensor]:
    """(last hidden states, and logits or score) of nine of the probe tokens, by transformers alone."""
    row = torch.tensor([probe_tokens[:5] + probe_tokens[8:12]], device=model.device)
    return model.base_model(input_ids=row).last_hidden_state[0], model(input_ids=row).logits[0].float()


def _are_close(actual: Tensor, expected: Tensor) -> bool:
    """True if all entries of two tensors are equal within 0.001, absolute and relative."""
    return torch.allclose(actual.float(), expected.float(), rtol=1e-3, atol=1e-3)
