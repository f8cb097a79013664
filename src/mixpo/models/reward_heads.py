"""Scalar heads and pad tokens of reward models.

A reward model is transformers' sequence classifier of the architecture. Many architectures have none (Granite, Cohere,
OLMoE, Llama 4, ... 103 of 189 in transformers 5.23): there a class with the same head on the base model is made, under
the name that transformers would give it. mixpo loads its folders; elsewhere, load the base with `AutoModel` and
multiply the last hidden state at the completion's last token by the tensor `score.weight`.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
from mixpo.data.tokens import NEW_PAD_TOKEN


def find_classifier_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """Find or make the reward-model class of a config's architecture. Raises `InputError` if there is none."""
    classifier: type[PreTrainedModel] | None = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if classifier is not None:
        return classifier
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is None:
        raise InputError(
            f"{folder}: found model_type {config.model_type!r}, of which transformers has no causal language model; "
            "expected a decoder-only language model"
        )
    return _make_classifier_class(causal)


@cache
def _make_classifier_class(causal_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Make a sequence-classifier class on the base class of a causal language model's class; cached."""
    family: Any = next(
        base
        for base in causal_class.__mro__
        if issubclass(base, PreTrainedModel) and not issubclass(base, GenerationMixin)
    )
    name = causal_class.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    body: dict[str, Any] = {"base_model_prefix": family.base_model_prefix, "__module__": __name__, "__doc__": __doc__}
    return type(name, (GenericForSequenceClassification, family), body)


def find_score_head(model: PreTrainedModel, folder: Path) -> nn.Linear:
    """The linear `score` layer of a sequence classifier. Raises `InputError` if it has another head."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{folder}: found an architecture whose sequence classifier, {type(model).__name__}, has no linear head "
            "`score`; expected one that has, or of which transformers has no sequence classifier; choose another model"
        )
    return head


def find_head_width(config: PretrainedConfig, folder: Path) -> int:
    """Numbers that the scalar head of an architecture's sequence classifier reads. Raises `InputError`."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"):
        return find_score_head(find_classifier_class(config, folder)(config), folder).in_features


def draw_head_weight(width: int, seed: int) -> Tensor:
    """Draw the weight of a scalar head, [1, width], from N(0, 1/(width+1)) (Stiennon et al. 2020)."""
    weight: Tensor = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5
    return weight


def make_score_head(weight: Tensor) -> nn.Linear:
    """Make a scalar head of this weight, [1, width], in float32; it does not train."""
    head = nn.Linear(weight.shape[1], 1, bias=False)
    head.weight = nn.Parameter(weight.float(), requires_grad=False)
    return head


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]) -> str:
    """Text of a special token to pad with that is no end token: the own, another, or one that the caller must add.

    Transformers reads a classifier's score at the rightmost token that is not the pad token, so an end token must not
    be the pad token.
    """
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special)
    for token in candidates:
        if token is not None and token not in end_tokens and token != tokenizer.eos_token_id:
            return str(tokenizer.convert_ids_to_tokens(token))
    return NEW_PAD_TOKEN
