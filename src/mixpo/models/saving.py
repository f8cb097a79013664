"""Saving of models as plain Hugging Face folders.

`AutoModelForCausalLM` (policies) and `AutoModelForSequenceClassification` (reward models) load them without mixpo.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from mixpo.models.adapter_folders import write_adapter_folder
from mixpo.models.digests import compute_model_digest
from mixpo.models.folders import let_others_read, refuse_non_finite_weights
from mixpo.models.language_model import LanguageModel
from mixpo.models.reward_heads import choose_pad_token


def save_model(lm: LanguageModel, folder: Path) -> str:
    """Write a model's folder, its adapters alone if it has some; returns the folder's digest.

    A whole model is a Hugging Face folder in the data type of the original. The model can be trained further. Raises
    `InputError`, before writing, if a weight is not finite in that type.
    """
    tokenizer = copy.deepcopy(lm.tokenizer)
    if lm.adapters:
        write_adapter_folder(lm, folder)
        pad = choose_pad_token(tokenizer, lm.end_tokens)
        if lm.is_reward_model and pad in tokenizer.get_vocab():
            tokenizer.pad_token = pad
        tokenizer.save_pretrained(folder)
        return compute_model_digest(folder)
    model = lm.model
    model.eval()
    config = copy.deepcopy(model.config)
    weights = _cast_weights(model, lm.dtype)
    remedy = "the training diverged: lower the learning rate"
    if lm.dtype == torch.float16:
        remedy += f", or save larger numbers than {torch.finfo(lm.dtype).max:g} by model.dtype=bfloat16"
    refuse_non_finite_weights(folder, {name: weights[name] for name, _ in model.named_parameters()}, remedy)
    if lm.is_reward_model:
        pad = choose_pad_token(tokenizer, lm.end_tokens)
        if pad in tokenizer.get_vocab():
            tokenizer.pad_token = pad  # adding it again would reset its flags
        else:
            tokenizer.add_special_tokens({"pad_token": pad})
        config.pad_token_id = tokenizer.pad_token_id
        _add_embedding_rows_for_pad_token(weights, model, config)
    published = getattr(model, "generation_config", None)
    if published is not None:
        model.generation_config = GenerationConfig()  # transformers refuses entries that many published ones have
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        if published is not None:
            model.generation_config = published
    config.architectures, config.dtype = model.config.architectures, lm.dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_generation_config(folder / "generation_config.json", published, lm)
    let_others_read(folder)
    return compute_model_digest(folder)


def write_current_weights(policy: LanguageModel, folder: Path) -> None:
    """Write a policy without adapters as a Hugging Face folder for another engine.

    Weights have the precision that the policy computes in. The output head is written by itself, even if it is tied to
    the embedding.
    """
    model, config = policy.model, policy.model.config
    dtype = torch.bfloat16 if policy.precision == "bfloat16" else torch.float32
    weights = {
        name: weight.detach().to(dtype) if weight.is_floating_point() else weight
        for name, weight in model.state_dict().items()
    }
    tied = config.tie_word_embeddings
    if tied:
        head = model.get_output_embeddings().weight
        for name, weight in model.state_dict().items():
            if weight.data_ptr() == head.data_ptr():
                weights[name] = weights[name].clone()
    config.tie_word_embeddings, written_dtype = False, config.dtype
    config.dtype = dtype
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        config.tie_word_embeddings, config.dtype = tied, written_dtype
    if policy.tokenizer is not None:
        policy.tokenizer.save_pretrained(folder)
    let_others_read(folder)


def _write_generation_config(file: Path, published: GenerationConfig | None, lm: LanguageModel) -> None:
    """Write a published `generation_config.json` with a model's end tokens, if one was saved."""
    if file.exists() and published is not None:
        others = sorted(lm.end_tokens - {lm.end_token})
        content = json.loads(published.to_json_string())
        content["eos_token_id"] = [lm.end_token, *others] if others else lm.end_token
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf8")


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's state dict in another float type, but for what its class keeps in float32; tied weights stay tied."""
    cast: dict[Any, Tensor] = {}
    float32_names = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]

    def cast_keeping_ties(name: str, weight: Tensor) -> Tensor:
        """The weight in the new type; the same tensor again for weights that share memory."""
        if not weight.is_floating_point() or any(part in name for part in float32_names):
            return weight
        storage = weight.data_ptr(), weight.shape, weight.stride()
        return cast.setdefault(storage, weight.to(dtype))

    return {name: cast_keeping_ties(name, weight) for name, weight in model.state_dict().items()}


def _add_embedding_rows_for_pad_token(
    weights: dict[str, Tensor], model: PreTrainedModel, config: PretrainedConfig
) -> None:
    """Append rows of zeros, never used, to the embeddings up to the pad token's, in place in `weights` and `config`."""
    embedding = model.get_input_embeddings().weight
    missing_rows = config.pad_token_id + 1 - len(embedding)
    if missing_rows > 0:
        name = next(name for name, weight in model.state_dict().items() if weight.data_ptr() == embedding.data_ptr())
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, missing_rows))
        config.vocab_size += missing_rows
