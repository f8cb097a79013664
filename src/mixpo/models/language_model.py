"""A language model as the stages see it, and what is read from it: log-probs, scores and values of branch batches.

Logits are computed only where a completion token is predicted, in chunks, so the softmax over the vocabulary is never
kept for a whole batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixpo.data.branches import BranchBatch

Precision = Literal["float32", "bfloat16"]

CHUNK_ELEMENTS = 1 << 25
"""Logits held at once: 32M elements, 128 MiB in float32."""


@dataclass
class LanguageModel:
    """A transformers model with its tokenizer. The model is a causal language model, or has a scalar `score` head."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_token: int
    shares_prompts: bool
    """Whether branches of one row see exactly what they would see alone; found out when the model is loaded."""
    precision: Precision = "float32"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that every forward pass runs in: matrix products in bfloat16, weights in float32."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16", cache_enabled=True
        )


def hidden_states(lm: LanguageModel, batch: BranchBatch) -> Float[Tensor, "places width"]:
    """The last hidden state at every place of the batch's rows, flattened."""
    mask = None if batch.is_plain else by_layer_type(lm.model, batch.attends)
    with lm.autocast():
        output = lm.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
        )
    states: Tensor = output.last_hidden_state
    return states.flatten(0, 1)


def by_layer_type(
    model: PreTrainedModel, attends: Callable[[int | None], Bool[Tensor, "rows 1 queries keys"]]
) -> Tensor | dict[str, Tensor]:
    """An attention mask in the form the model takes: with its sliding window, one mask a layer type where they differ.

    `attends` makes the mask for a window, or for none.
    """
    config = model.config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    types: set[str] = set(getattr(config, "layer_types", None) or ())
    if window is None or types == {"full_attention"} or getattr(config, "use_sliding_window", True) is False:
        return attends(None)
    if types in ({"sliding_attention"}, set()):
        return attends(window)
    return {"full_attention": attends(None), "sliding_attention": attends(window)}


def branch_logprobs(
    lm: LanguageModel, batch: BranchBatch, hidden: Float[Tensor, "places width"] | None = None
) -> tuple[Float[Tensor, "prompts k tokens"], Float[Tensor, "prompts k tokens"]]:
    """Log-probs of the completion tokens and entropies of the distributions they were drawn from.

    Both in nats, at temperature 1, 0 where the mask is false. Gradients flow through the log-probs only.
    """
    if hidden is None:
        hidden = hidden_states(lm, batch)
    head = lm.model.get_output_embeddings()
    logprobs, entropies = [], []
    with lm.autocast():
        sources, targets = hidden[batch.source[batch.mask]], batch.completions[batch.mask]
        chunk = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
        for start in range(0, len(targets), chunk):
            part = sources[start : start + chunk], targets[start : start + chunk]
            several = len(targets) > chunk and torch.is_grad_enabled()
            logprob, entropy = (
                checkpoint(_predict, head, *part, use_reentrant=False) if several else _predict(head, *part)
            )
            logprobs.append(logprob)
            entropies.append(entropy)
    empty = torch.zeros(batch.mask.shape, device=hidden.device)
    return (
        empty.masked_scatter(batch.mask, torch.cat(logprobs)),
        empty.masked_scatter(batch.mask, torch.cat(entropies)),
    )


def _predict(head: nn.Module, hidden: Tensor, targets: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    total = logits.logsumexp(dim=-1)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - total
    with torch.no_grad():
        entropy = total - (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)
    return logprobs, entropy


def branch_scores(lm: LanguageModel, batch: BranchBatch) -> Float[Tensor, "prompts k"]:
    """The reward model's score of every completion, read at its last token."""
    hidden = hidden_states(lm, batch)
    with lm.autocast():
        scores: Tensor = lm.model.score(hidden[batch.last])
    return scores[..., 0].float()


def branch_values(
    lm: LanguageModel, batch: BranchBatch, head: nn.Module, hidden: Float[Tensor, "places width"] | None = None
) -> Float[Tensor, "prompts k tokens"]:
    """Values of the states in which the completion tokens are chosen: read where each token is predicted.

    In reward units, 0 where the mask is false.
    """
    if hidden is None:
        hidden = hidden_states(lm, batch)
    with lm.autocast():
        values: Tensor = head(hidden[batch.source])
    return values[..., 0].float().masked_fill(~batch.mask, 0.0)
