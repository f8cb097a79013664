"""Reward models of every architecture: a scalar head on the base model, and the token that pads its batches.

Where transformers has a sequence classifier of the architecture, a reward model is one. For the many that have none
(Granite, Cohere, OLMoE, Llama 4, ... 103 of 189 in transformers 5.23) the same head stands on the architecture's base
model, under the name that such a class would have. Such a folder loads here; elsewhere `AutoModel` loads its base, and
its head is the tensor `score.weight`, to be multiplied with the last hidden state at the completion's last token.
"""

from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification

from mixpo.data.errors import InputError

PADDING = "<|reward_padding|>"
"""The token that is added where a tokenizer has no other to pad with."""


def find_classifier_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class of reward models on a config's architecture. Raises `InputError` where there can be none."""
    known: type[PreTrainedModel] | None = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if known is not None:
        return known
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is None:
        raise InputError(
            f"{folder}: found model_type {config.model_type!r}, of which transformers has no causal language model; "
            "expected a decoder-only language model"
        )
    return _on_base_model(causal)


@cache
def _on_base_model(causal: type[PreTrainedModel]) -> type[PreTrainedModel]:
    family: Any = next(
        one for one in causal.__mro__ if issubclass(one, PreTrainedModel) and not issubclass(one, GenerationMixin)
    )
    name = causal.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    body: dict[str, Any] = {"base_model_prefix": family.base_model_prefix, "__module__": __name__, "__doc__": __doc__}
    return type(name, (GenericForSequenceClassification, family), body)


def find_score_head(model: PreTrainedModel, folder: Path) -> nn.Linear:
    """A sequence classifier's head, one linear layer. Raises `InputError` where it has another."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{folder}: found an architecture whose sequence classifier, {type(model).__name__}, has no linear head "
            "`score`; expected one that has, or of which transformers has no sequence classifier; choose another model"
        )
    return head


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> str:
    """The text of a token that can pad behind completions: special, and never one that ends them.

    Transformers reads a classifier's score at the rightmost token that is not the pad token, so a completion's own end
    token must not pad. The tokenizer's own pad token, if it is none, else another special token, else a new one.
    """
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    named = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special)
    for token in named:
        if token is not None and token not in ends and token != tokenizer.eos_token_id:
            return str(tokenizer.convert_ids_to_tokens(token))
    return PADDING
