"""Comparison of tokenizers."""

import json
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
)

from mixpo.data.tokens import find_end_token, parses_special_tokens


def have_same_tokenization(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Return True if two tokenizers turn every prompt and completion into the same tokens; pad tokens may differ."""
    if first is second:
        return True
    rules, added = _read_tokenization_rules(first)
    second_rules, second_added = _read_tokenization_rules(second)
    differing = {
        str(entry["content"])
        for entry in _find_missing_tokens(added, second_added) + _find_missing_tokens(second_added, added)
    }
    return (
        rules == second_rules
        and differing <= {first.pad_token, second.pad_token}
        and first.chat_template == second.chat_template
        and find_end_token(first) == find_end_token(second)
        and parses_special_tokens(first) == parses_special_tokens(second)
    )


def _find_missing_tokens(added: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the added tokens that the other tokenizer does not have."""
    return [entry for text, entry in added.items() if text not in other]


def _read_tokenization_rules(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Return the rules that turn text into tokens (not padding and truncation), and separately the added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return (type(tokenizer).__name__, tokenizer.get_vocab()), {}
    rules = json.loads(backend.to_str())
    added = {json.dumps(token, sort_keys=True): token for token in rules.pop("added_tokens")}
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}, added
