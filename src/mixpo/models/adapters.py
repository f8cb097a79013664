"""LoRA adapters: adding them to a model, freezing weights, and merging adapters into the weights."""

from typing import Literal

import pydantic
import torch
from transformers import PreTrainedModel

from mixpo.data.errors import InputError
from mixpo.models.folders import explain_loading_errors
from mixpo.models.language_model import LanguageModel, iterate_matrix_modules
from mixpo.settings import Settings


class LoraSettings(Settings):
    """Settings of low-rank adapters on every linear layer, merged into the saved weights (Hu et al. 2021)."""

    rank: int = pydantic.Field(16, ge=1)
    alpha: float = pydantic.Field(32.0, gt=0)
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    rank_stabilized: bool = False
    """Scale the adapters by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that are adapted, or the last parts of their names, such as q_proj."""


def add_lora(lm: LanguageModel, lora: LoraSettings) -> None:
    """Add trainable adapters to a model in place and freeze all other weights but a scalar head's."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilized,
        target_modules=lora.target_modules if lora.target_modules == "all-linear" else list(lora.target_modules),
        exclude_modules=["score"] if hasattr(lm.model, "score") else None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in lm.model.modules()),  # GPT-2
    )
    matrices = set(iterate_matrix_modules(lm.model))
    layers = [name for name, module in lm.model.named_modules() if module in matrices]
    for target in lora.target_modules if lora.target_modules != "all-linear" else ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise InputError(f"lora.target_modules: found {target!r}; expected layers of the model: {', '.join(ends)}")
    lm.model = get_peft_model(lm.model, config).get_base_model()
    if hasattr(lm.model, "score"):
        lm.model.score.requires_grad_(True)
    cast_frozen_weights(lm)


def freeze_model(lm: LanguageModel) -> LanguageModel:
    """Make all weights of a model untrainable and cast them to the precision they are used in, in place; returns it."""
    lm.model.requires_grad_(False)
    cast_frozen_weights(lm)
    return lm


def cast_frozen_weights(lm: LanguageModel) -> None:
    """Cast a model's frozen matrices to bfloat16, in place, if it computes in bfloat16; else do nothing.

    Results do not change: embeddings, norms, a scalar head and the output head's bias, which are used in float32, stay
    in float32. An output head tied to the embedding gets a copy of its own.
    """
    if lm.precision != "bfloat16":
        return
    head = lm.model.get_output_embeddings()
    for module in iterate_matrix_modules(lm.model):
        if module is getattr(lm.model, "score", None):
            continue
        for name in ("weight",) if module is head else ("weight", "bias"):
            weight = getattr(module, name)
            if weight is not None and not weight.requires_grad:
                setattr(module, name, torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False))


@torch.no_grad()
def merge_adapters(lm: LanguageModel) -> PreTrainedModel:
    """A new model, its folder's weights with the adapters merged into them; the model itself if it has no adapters."""
    from peft.tuners.lora import LoraLayer

    lora_layers = {name: module for name, module in lm.model.named_modules() if isinstance(module, LoraLayer)}
    if not lora_layers:
        return lm.model
    with explain_loading_errors(str(lm.folder)):
        merged: PreTrainedModel = type(lm.model).from_pretrained(
            lm.folder, config=lm.model.config, dtype=torch.float32, local_files_only=True
        )
    for name, module in lora_layers.items():
        weight = merged.get_submodule(name).weight
        weight += module.get_delta_weight("default").to(weight.device)
    for name, parameter in lm.model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            merged.get_parameter(name).copy_(parameter)
    return merged
