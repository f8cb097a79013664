"""Comparing tokenizers."""

import json
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
)

from mixpo.data.tokens import find_end_token, parses_special_tokens


def tokenize_alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn every prompt and completion into the same tokens, whatever they pad with."""
    if one is other:
        return True
    rules, added = _rules(one)
    other_rules, other_added = _rules(other)
    unlike = {str(entry["content"]) for entry in _differing(added, other_added) + _differing(other_added, added)}
    return (
        rules == other_rules
        and unlike <= {one.pad_token, other.pad_token}
        and one.chat_template == other.chat_template
        and find_end_token(one) == find_end_token(other)
        and parses_special_tokens(one) == parses_special_tokens(other)
    )


def _differing(added: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for text, entry in added.items() if text not in other]


def _rules(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, dict[str, dict[str, Any]]]:
    """All that decides how text becomes tokens, without padding and truncation, and the added tokens apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return (type(tokenizer).__name__, tokenizer.get_vocab()), {}
    rules = json.loads(backend.to_str())
    added = {json.dumps(token, sort_keys=True): token for token in rules.pop("added_tokens")}
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}, added
