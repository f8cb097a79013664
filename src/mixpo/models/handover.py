"""Folders in which all of a policy's current weights are handed over to another engine."""

from pathlib import Path

import torch

from mixpo.models.language_model import LanguageModel


def write_weights(policy: LanguageModel, folder: Path) -> None:
    """Write a policy without adapters as a Hugging Face folder, in the precision that it computes in.

    The output head is written by itself, even if it is tied to the embedding.
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
