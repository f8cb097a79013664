"""FLOPs and bytes that a workload needs, whichever software computes it."""

from collections.abc import Iterable
from typing import Any

Lengths = tuple[int, list[int]]
"""Tokens of a prompt and of each of its completions."""


def forward_flops(rows: Iterable[Lengths], config: Any, *, predicts: bool) -> float:
    """FLOPs of one forward pass with every prompt once, and logits (if `predicts`) only for completion tokens.

    2 a weight and token; attention 4 a layer, width and visible query-key pair.
    """
    rows = list(rows)
    width, layers = config.hidden_size, config.num_hidden_layers
    key = width * config.num_key_value_heads // config.num_attention_heads
    weights = layers * (2 * width * width + 2 * width * key + 3 * width * config.intermediate_size)
    predicted = sum(sum(completions) for _, completions in rows) if predicts else 0
    visible = sum(
        prompt * (prompt + 1) / 2 + sum(tokens * prompt + tokens * (tokens + 1) / 2 for tokens in completions)
        for prompt, completions in rows
    )
    return 2 * weights * count_tokens(rows) + 2 * width * config.vocab_size * predicted + 4 * layers * width * visible


def count_tokens(rows: Iterable[Lengths]) -> int:
    """Count tokens: every prompt once, and its completions."""
    return sum(prompt + sum(completions) for prompt, completions in rows)


def decoding_bytes(rows: Iterable[Lengths], config: Any, itemsize: int) -> float:
    """Bytes that decoding reads: all weights once a step, and at every token the keys and values before it.

    The first token of a completion is predicted by the prefill.
    """
    rows = list(rows)
    width, layers = config.hidden_size, config.num_hidden_layers
    key = width * config.num_key_value_heads // config.num_attention_heads
    weights = layers * (2 * width * width + 2 * width * key + 3 * width * config.intermediate_size)
    steps = max((max(completions) for _, completions in rows), default=1) - 1
    keys = sum((tokens - 1) * prompt + tokens * (tokens - 1) / 2 for prompt, lengths in rows for tokens in lengths)
    return itemsize * (steps * (weights + width * config.vocab_size) + 2 * layers * key * keys)
