"""Folders in which a policy's current weights are handed over to another engine: as an adapter, or whole."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixpo.models.language_model import LanguageModel


def has_adapters(policy: LanguageModel) -> bool:
    """True if the policy computes with LoRA adapters."""
    from peft.tuners.lora import LoraLayer

    return policy.adapters_enabled and any(isinstance(module, LoraLayer) for module in policy.model.modules())


def write_adapter(policy: LanguageModel, folder: Path) -> int:
    """Write the policy's LoRA adapter as a peft folder in float32; returns its rank. The base is `policy.folder`."""
    from peft.tuners.lora import LoraLayer

    weights, targets, rank, scale = dict[str, Tensor](), set[str](), 0, 1.0
    for name, module in policy.model.named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            rank, scale = len(a), module.scaling["default"]
            targets.add(name.rpartition(".")[2])
            for part, weight in (("lora_A", a), ("lora_B", b)):
                weights[f"base_model.model.{name}.{part}.weight"] = weight.detach().float().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(policy.folder),
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(targets),
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
    return rank


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
