"""Writing models as plain Hugging Face folders.

`AutoModelForCausalLM` (policies) or `AutoModelForSequenceClassification` (reward models) loads them without any code of
ours.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from mixpo.data.errors import InputError
from mixpo.models.adapters import merge_adapters
from mixpo.models.digests import model_digest
from mixpo.models.language_model import (
    LanguageModel,
)
from mixpo.models.reward_heads import choose_pad_token


def save_model(lm: LanguageModel, folder: Path) -> str:
    """Write a plain Hugging Face folder, adapters merged, in the type of the folder it began as; returns its digest.

    The model can be trained further. Raises `InputError` if a weight is not finite in that type, and writes nothing.
    """
    model = merge_adapters(lm)
    model.eval()
    config, tokenizer = copy.deepcopy(model.config), copy.deepcopy(lm.tokenizer)
    weights = _cast_weights(model, lm.dtype)
    remedy = "the training diverged: lower the learning rate"
    if lm.dtype == torch.float16:
        remedy += f", or save larger numbers than {torch.finfo(lm.dtype).max:g} by model.dtype=bfloat16"
    refuse_non_finite_weights(folder, {name: weights[name] for name, _ in model.named_parameters()}, remedy)
    if hasattr(model, "score"):
        pad = choose_pad_token(tokenizer, lm.end_tokens)
        if pad in tokenizer.get_vocab():
            tokenizer.pad_token = pad  # added again, its entry would lose its flags
        else:
            tokenizer.add_special_tokens({"pad_token": pad})
        config.pad_token_id = tokenizer.pad_token_id
        _make_room(weights, model, config)
    model.save_pretrained(folder, state_dict=weights)
    config.architectures, config.dtype = model.config.architectures, lm.dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_end_tokens(folder / "generation_config.json", lm)
    return model_digest(folder)


def _write_end_tokens(file: Path, lm: LanguageModel) -> None:
    """Name the end tokens in a saved `generation_config.json`, whose other entries stay as they were published.

    Transformers would check all of them where one has changed, and refuse what many published files hold.
    """
    if file.exists():
        others = sorted(lm.end_tokens - {lm.end_token})
        content = json.loads(file.read_text(encoding="utf8"))
        content["eos_token_id"] = [lm.end_token, *others] if others else lm.end_token
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf8")


def refuse_non_finite_weights(folder: Path, weights: Mapping[str, Tensor], remedy: str) -> None:
    """Raise `InputError`, with the remedy, if a weight is infinite or undefined."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise InputError(
                f"{folder}: found infinite or undefined numbers in {name}; expected finite weights; {remedy}"
            )


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's weights in another floating-point type; those that are tied stay one tensor.

    What the architecture keeps in float32 (a router's correction, say) stays in it.
    """
    cast: dict[Any, Tensor] = {}
    wide = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]

    def once(name: str, weight: Tensor) -> Tensor:
        if not weight.is_floating_point() or any(part in name for part in wide):
            return weight
        place = weight.data_ptr(), weight.shape, weight.stride()
        return cast.setdefault(place, weight.to(dtype))

    return {name: once(name, weight) for name, weight in model.state_dict().items()}


def _make_room(weights: dict[str, Tensor], model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Give the embeddings a row of zeros for a pad token that they have none for; nothing ever reads it."""
    embedding = model.get_input_embeddings().weight
    lacking = config.pad_token_id + 1 - len(embedding)
    if lacking > 0:
        name = next(name for name, weight in model.state_dict().items() if weight.data_ptr() == embedding.data_ptr())
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, lacking))
        config.vocab_size += lacking
