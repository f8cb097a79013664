"""Tiny models of several architectures, and the slow, obvious way to compute what branch batches compute."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mixpo.data.branches import Completions, convert_to_unpadded_lists
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Network
from mixpo.models.sampling import SampledCompletions

VOCABULARY = 89
END = 5
WINDOW = 6
"""Of Mistral and Gemma 3: shorter than the rows of the tests."""


_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
_LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", {"intermediate_size": 48}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "gemma3": ("gemma3_text", {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW, **_LAYER_TYPES}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": WINDOW}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi3": ("phi3", _GROUPED),
}
ARCHITECTURES = tuple(_CONFIGS)


def tiny(name: str) -> LanguageModel:
    """A two-layer model with weights large enough that every token matters."""
    torch.manual_seed(0)
    model_type, sizes = _CONFIGS[name]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
        **sizes,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return LanguageModel(Network(model), None, END)  # type: ignore[arg-type]


def plain_logprobs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """One forward pass of one sequence through transformers' own attention, softmax over everything."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    model.set_attn_implementation(attention)
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@torch.no_grad()
def assert_plain_logprobs(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[list[int]]],
    logprobs: torch.Tensor,
    tolerance: float,
) -> None:
    """Check log-probs [prompts, k, tokens] against plain forward passes; they are 0 after a completion's end."""
    for row, (prompt, branches) in enumerate(zip(prompts, completions, strict=True)):
        for branch, completion in enumerate(branches):
            actual, expected = logprobs[row, branch], plain_logprobs(model, prompt, completion)
            torch.testing.assert_close(actual[: len(completion)], expected, rtol=1e-5, atol=tolerance)
            assert not actual[len(completion) :].any()


@dataclass(frozen=True)
class Row:
    """The completions of one prompt, as lists."""

    completions: list[list[int]]
    logprobs: list[list[float]]


def rows_of_sample(sampled: SampledCompletions) -> list[Row]:
    logprobs = convert_to_unpadded_lists(sampled.logprobs, sampled.mask)
    return [Row(*row) for row in zip(sampled.to_lists(), logprobs, strict=True)]


def sample_of_rows(rows: Sequence[Row], end_tokens: Collection[int]) -> SampledCompletions:
    completions = Completions.from_lists([row.completions for row in rows])
    values = torch.tensor([value for row in rows for branch in row.logprobs for value in branch])
    logprobs = torch.zeros(completions.mask.shape).masked_scatter(completions.mask, values)
    ended = torch.tensor([[completion[-1] in end_tokens for completion in row.completions] for row in rows])
    return SampledCompletions(completions.tokens, completions.mask, logprobs, ended)
