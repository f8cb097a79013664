"""Folders of adapters: plain ones of peft, with the path and the digest of the base model in `base.json`.

A stage that trains adapters on a model that has some already writes the sum of both as one adapter on the same base:
B1 A1 + B2 A2 = [B1 B2] [A1; A2], which is exact, where adding it to weights in bfloat16 is not.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mixpo.data.errors import InputError
from mixpo.models.adapters import add_frozen_adapters, has_transposed_layers, iterate_adapter_weights
from mixpo.models.digests import compute_model_digest
from mixpo.models.folders import (
    DOWNLOAD_HINT,
    explain_loading_errors,
    let_others_read,
    refuse_non_finite_weights,
)
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Network

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
_PREFIX = "base_model.model."
"""Prefix that peft puts before the names of a model's modules."""
_HEAD = "score.weight"


@dataclass(frozen=True)
class AdapterFolder:
    """A checked folder of adapters: their configuration and weights, and the folder of the model that they adapt."""

    path: Path
    base: Path
    config: Any
    """`LoraConfig` of peft."""
    weights: dict[str, Tensor]
    """Weights by the names of `iterate_adapter_weights`."""
    head: Tensor | None
    """Weights of a reward model's scalar head, [1, width]; None for a policy."""


def holds_adapters(folder: Path) -> bool:
    """True if a folder holds adapters instead of a whole model."""
    return (folder / CONFIG).exists()


def write_adapter_folder(lm: LanguageModel, folder: Path) -> int:
    """Write the sum of a model's adapters to a folder, as one adapter in float32 with a scale of 1; returns its rank.

    transformers and peft load it by `AutoPeftModelForCausalLM.from_pretrained`, a reward model by
    `AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)`. Raises `InputError`, before writing,
    if a weight is not finite.
    """
    from peft import LoraConfig

    assert lm.folder is not None
    weights = collect_adapter_weights(lm)
    refuse_non_finite_weights(folder, weights, "the training diverged: lower the learning rate")
    ranks = {name.removesuffix(".lora_A"): len(down) for name, down in weights.items() if name.endswith(".lora_A")}
    saved = sorted({name.rpartition(".")[0] for name in weights if ".lora_" not in name})
    rank = max(ranks.values())
    others = {f"^{name}": own for name, own in ranks.items() if own != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=_shorten_names(lm.model, list(ranks)),
        modules_to_save=saved + ["score"] * lm.is_reward_model or None,
        fan_in_fan_out=has_transposed_layers(lm.network),
        base_model_name_or_path=str(lm.folder.resolve()),
        task_type="SEQ_CLS" if lm.is_reward_model else "CAUSAL_LM",
        inference_mode=True,
    )
    if lm.is_reward_model:
        weights[_HEAD] = lm.score_head.weight.detach()
    folder.mkdir(parents=True, exist_ok=True)
    entries = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    (folder / CONFIG).write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf8")
    tensors = {
        f"{_PREFIX}{name}.weight" if ".lora_" in name else f"{_PREFIX}{name}": weight.contiguous().cpu()
        for name, weight in weights.items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    let_others_read(folder)
    base = {"path": os.path.relpath(lm.folder.resolve(), folder.resolve()), "digest": compute_model_digest(lm.folder)}
    (folder / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf8")
    return rank


@torch.no_grad()
def collect_adapter_weights(lm: LanguageModel) -> dict[str, Tensor]:
    """The sum of a model's adapters as one with a scale of 1, in float32, by the names of `iterate_adapter_weights`."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in lm.model.named_modules() if isinstance(module, LoraLayer)}
    weights: dict[str, Tensor] = {}
    for adapter in lm.adapters:
        for name, weight in iterate_adapter_weights(lm.network, adapter):
            factor = weight.detach().float()
            if name.endswith(".lora_B"):
                factor = layers[name.removesuffix(".lora_B")].scaling[adapter] * factor
            if ".lora_" in name and name in weights:
                factor = torch.cat([weights[name], factor], dim=0 if name.endswith(".lora_A") else 1)
            weights[name] = factor
    return weights


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Read a folder that `write_adapter_folder` wrote. Raises `InputError` if it is damaged or its base has changed."""
    from peft import LoraConfig

    expected = "expected adapters that mixpo wrote"
    with explain_loading_errors(folder, "adapters that cannot be read", f"{expected}; {DOWNLOAD_HINT}"):
        if not (folder / BASE).exists():
            raise InputError(
                f"{folder}: found adapters without {BASE}; {expected}, or a whole model; merge others with peft's "
                "`merge_and_unload` and save the result"
            )
        entries = json.loads((folder / BASE).read_text(encoding="utf8"))
        base, digest = (folder.resolve() / entries["path"]).resolve(), entries["digest"]
        config = LoraConfig.from_pretrained(folder)
        weights = {
            name.removeprefix(_PREFIX).replace(".lora_A.weight", ".lora_A").replace(".lora_B.weight", ".lora_B"): weight
            for name, weight in load_file(folder / WEIGHTS).items()
        }
    if not base.is_dir():
        raise InputError(
            f"{folder}: found no folder {base}; expected the model that the adapters change; move both together"
        )
    if (base_digest := compute_model_digest(base)) != digest:
        raise InputError(
            f"{folder}: found adapters for a model with digest {digest}, and {base} with digest {base_digest}; "
            "expected the model that they were trained on; put it back, or train them again"
        )
    refuse_non_finite_weights(folder, weights, DOWNLOAD_HINT)
    head = weights.pop(_HEAD, None)
    config.modules_to_save = [name for name in config.modules_to_save or () if name != "score"] or None
    config.inference_mode = False
    return AdapterFolder(folder, base, config, weights, head)


def add_adapter_folder(network: Network, name: str, adapters: AdapterFolder) -> None:
    """Add a folder's adapters to its base's network under a name. Raises `InputError` if they do not fit."""
    with explain_loading_errors(
        adapters.path, "adapters that do not fit", f"expected those of the model in {adapters.base}; {DOWNLOAD_HINT}"
    ):
        add_frozen_adapters(network, name, adapters.config, adapters.weights)


@torch.no_grad()
def merge_adapter_folder(model: PreTrainedModel, adapters: AdapterFolder) -> None:
    """Add a folder's adapters to the weights of a model, W + B A, in place. Raises `InputError` if they do not fit."""
    with explain_loading_errors(
        adapters.path, "adapters that do not fit", f"expected those of the model in {adapters.base}; {DOWNLOAD_HINT}"
    ):
        for name, weight in adapters.weights.items():
            if name.endswith(".lora_A"):
                module = model.get_submodule(name.removesuffix(".lora_A"))
                product = adapters.weights[name.removesuffix("A") + "B"] @ weight
                product = product.T if isinstance(module, Conv1D) else product
                module.weight.copy_(module.weight.float() + product.to(module.weight.device))
            elif not name.endswith(".lora_B") and not _is_missing_output_head(model, name):
                model.get_parameter(name).copy_(weight)


def _is_missing_output_head(model: PreTrainedModel, weight_name: str) -> bool:
    """True for a weight of a policy's output head in a reward model, which has none."""
    return model.get_output_embeddings() is None and not hasattr(model, weight_name.split(".")[0])


def _shorten_names(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Last parts of modules' names, such as `q_proj`, if they name the same modules of a model; else the names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return short if named == set(names) else sorted(names)
