"""LoRA adapters of networks: adding new ones to train, and old ones as they were saved."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mixpo.data.errors import InputError
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Network, iterate_matrix_modules
from mixpo.settings import Settings


class LoraSettings(Settings):
    """Settings of low-rank adapters, which train instead of the model's weights (Hu et al. 2021)."""

    rank: int = pydantic.Field(16, ge=1)
    alpha: float = pydantic.Field(32.0, gt=0)
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    rank_stabilized: bool = False
    """Scale the adapters by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that are adapted, or the last parts of their names, such as q_proj."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules, or the last parts of them, that train whole and are saved with the adapters. Those that trained
    whole in an earlier stage are not adapted: they stay as they are unless they are named again."""
    quantize_base: bool = False
    """Hold the matrices of frozen models in 4 bits while training (QLoRA, Dettmers et al. 2023); needs bitsandbytes.
    The adapters stay those of the whole model, on which they are sampled from and evaluated."""

    @pydantic.field_validator("target_modules", mode="before")
    @classmethod
    def _check_target_modules(cls, targets: Any) -> Any:
        """Validator: raise ValueError unless it is `all-linear` or names."""
        is_list = isinstance(targets, list | tuple) and targets and all(isinstance(name, str) for name in targets)
        if targets != "all-linear" and not is_list:
            raise ValueError("all-linear, or a list of names of layers, such as [q_proj, v_proj]")
        return targets


def add_lora(lm: LanguageModel, lora: LoraSettings, name: str = "trained") -> None:
    """Add trainable adapters of this name to a model in place; its scalar head, if it has one, trains as a copy.

    All other weights of its network keep what they are. Raises `InputError` on modules that the model does not have.
    """
    from peft import LoraConfig

    network = lm.network
    targets, saved = _choose_lora_modules(network, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilized,
        target_modules=targets,
        modules_to_save=saved or None,
        fan_in_fan_out=has_transposed_layers(network),
    )
    _inject_adapters(network, name, config)
    for parameter_name, parameter in network.named_parameters():
        if f".{name}." in f".{parameter_name}.":
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    _copy_saved_modules(network, lm.adapters, name)
    if lm.head is not None:
        network.heads[name] = nn.Linear(lm.score_head.in_features, 1, bias=False, device=lm.device)
        weight = lm.score_head.weight.detach()
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight  # of a network cut over processes
        network.heads[name].load_state_dict({"weight": whole.float()})
        lm.head = name
    lm.adapters = (*lm.adapters, name)


def add_frozen_adapters(network: Network, name: str, config: Any, weights: Mapping[str, Tensor]) -> None:
    """Add adapters with these weights under a name to a network, in place; they do not train.

    `config` is the `LoraConfig` of peft with which they were saved. `weights` are named as `iterate_adapter_weights`
    names them. Raises KeyError on weights that the network has no place for, and ValueError on missing ones, others'
    shapes, and modules that train whole in one of the network's models and are adapted in another one.
    """
    names = {name.rpartition(".")[0] for name in weights}
    layers = {name.rpartition(".")[0] for name in weights if ".lora_" in name}
    if both := sorted(layers & _list_whole_modules(network) | (names - layers) & _list_adapted_layers(network)):
        raise ValueError(
            f"of two stages' models on one base, {both[0]} trains whole in one (lora.modules_to_save) and is adapted "
            "in the other"
        )
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
        _inject_adapters(network, name, config)
    places = dict(iterate_adapter_weights(network, name))
    if missing := sorted(places.keys() - weights.keys()):
        raise ValueError(f"no tensor {missing[0]}")
    for weight_name, weight in weights.items():
        place = places[weight_name]
        if place.shape != weight.shape:
            raise ValueError(f"{weight_name} {list(weight.shape)} (not {list(place.shape)})")
        place.data = weight.to(network.device, torch.float32)
        place.requires_grad_(False)


@contextmanager
def join_adapters(network: Network, names: Sequence[str]) -> Iterator[None]:
    """Context manager of passes without gradients under these adapters, which are one adapter of the summed rank in it.

    As a chain is written: B₁A₁ + B₂A₂ = [B₁ B₂][A₁; A₂]. Peft computes one after the other, casting the weights of each
    in every pass, which in decoding costs as much as a third of the layer itself.
    """
    dtype = torch.bfloat16 if network.precision == "bfloat16" else torch.float32
    layers = []
    for layer in network.adapted_modules:
        present = [name for name in names if name in getattr(layer, "lora_A", ())]
        if present:
            down = torch.cat([layer.lora_A[name].weight for name in present]).to(dtype)
            up = torch.cat([layer.scaling[name] * layer.lora_B[name].weight for name in present], dim=1).to(dtype)

            def compute(x: Tensor, base: Any = layer.base_layer, down: Tensor = down, up: Tensor = up) -> Tensor:
                """The layer's output [..., out] of inputs [..., in]."""
                x = x.to(down.dtype)
                output: Tensor = base(x) + functional.linear(functional.linear(x, down), up)
                return output

            layer.forward = compute
            layers.append(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def iterate_adapter_weights(network: Network, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, weight) of an adapter, as `model.layers.0.mlp.up_proj.lora_A`, and of modules that train whole."""
    for name, parameter in network.model.named_parameters():
        if f".{adapter_name}." in name:
            name = name.replace(f".modules_to_save.{adapter_name}.", ".")
            yield name.removesuffix(f".{adapter_name}.weight") if ".lora_" in name else name, parameter


def _choose_lora_modules(network: Network, lora: LoraSettings) -> tuple[list[str], list[str]]:
    """Names of the layers that get adapters, and of the modules that train whole. Raises `InputError` on conflicts."""
    model = network.model
    unadapted, adapted = _list_whole_modules(network), _list_adapted_layers(network)
    modules = [name for name, _ in model.named_modules() if name and not _is_part_of_adapters(name)]
    saved = _find_parts_with_weights(network, _find_modules("modules_to_save", lora, modules))
    head = model.get_output_embeddings()
    layers = [
        layer
        for name, module in iterate_matrix_modules(model)
        if module is not head and not _is_part_of_adapters(layer := name.removesuffix(".base_layer"))
        if layer.split(".")[0] != "score" and not _is_within(layer, {*unadapted, *saved})
    ]
    layers = list(dict.fromkeys(layers))
    if not layers:
        raise InputError(f"lora.modules_to_save: found {saved[0]!r} and all others; expected some layers left to adapt")
    targets = layers if lora.target_modules == "all-linear" else _find_modules("target_modules", lora, layers)
    if both := [module for module in saved if module in adapted]:
        raise InputError(
            f"lora.modules_to_save: found {both[0]!r}, to which an earlier stage has added adapters; expected modules "
            "that train whole from the first stage on"
        )
    if tied := [module for module in saved if _is_tied_embedding(network, model.get_submodule(module))]:
        raise InputError(
            f"lora.modules_to_save: found {tied[0]!r}, whose weights are also those of another module of the model; "
            "expected modules with weights of their own; leave it out"
        )
    packed = {name for name, weight in model.named_parameters() if not weight.is_floating_point()}
    if both := [module for module in saved if f"{module}.weight" in packed]:
        raise InputError(
            f"lora.modules_to_save: found {both[0]!r} beside lora.quantize_base, which holds it in 4 bits; expected "
            "other modules, such as norms, or one of the two settings"
        )
    return targets, saved


def _inject_adapters(network: Network, name: str, config: Any) -> None:
    """Add adapters to a network by peft, in place; what trained before does so afterwards, and nothing else."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if config.modules_to_save and any(isinstance(weight, DTensor) for weight in network.parameters()):
        raise InputError(
            "lora.modules_to_save: found some beside runtime.sharded; expected one of the two; weights that are cut "
            "over processes are not copied"
        )
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network.model, adapter_name=name)
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    modules = [part for part in network.modules() if isinstance(part, LoraLayer | ModulesToSaveWrapper)]
    network.register_adapters(name, modules)


def _copy_saved_modules(network: Network, earlier: tuple[str, ...], name: str) -> None:
    """Set the modules that train whole under this name to those of the newest of the earlier adapters that has them."""
    new = dict(iterate_adapter_weights(network, name))
    for adapter in earlier:
        for weight_name, weight in iterate_adapter_weights(network, adapter):
            if weight_name in new and ".lora_" not in weight_name:
                new[weight_name].data.copy_(weight)


def _list_whole_modules(network: Network) -> set[str]:
    """Names of the modules of a network's model that train whole in some adapters."""
    from peft.utils import ModulesToSaveWrapper

    return {name for name, part in network.model.named_modules() if isinstance(part, ModulesToSaveWrapper)}


def _list_adapted_layers(network: Network) -> set[str]:
    """Names of the layers of a network's model that have adapters."""
    from peft.tuners.lora import LoraLayer

    return {name for name, part in network.model.named_modules() if isinstance(part, LoraLayer)}


def _is_part_of_adapters(name: str) -> bool:
    """True for the name of a module that peft has put into another one."""
    parts = name.split(".")
    return any(part in ("base_layer", "original_module", "modules_to_save") or part[:5] == "lora_" for part in parts)


def _is_within(name: str, modules: Iterable[str]) -> bool:
    """True if a module is one of some modules or a part of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _find_parts_with_weights(network: Network, modules: list[str]) -> list[str]:
    """Names of the outermost parts of modules that have weights of their own, such as a block's layers."""
    wrapped, parts = _list_whole_modules(network) | _list_adapted_layers(network), set[str]()
    for name, part in network.model.named_modules():
        has_weights = name in wrapped or any(True for _ in part.parameters(recurse=False))
        if has_weights and not _is_part_of_adapters(name) and _is_within(name, modules) and not _is_within(name, parts):
            parts.add(name)
    return sorted(parts)


def _find_modules(
    setting: Literal["target_modules", "modules_to_save"], lora: LoraSettings, names: list[str]
) -> list[str]:
    """Names of the modules that a setting names by their last parts. Raises `InputError` where there is none."""
    modules = list[str]()
    for target in getattr(lora, setting):
        matches = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matches:
            ends = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
            what = "layers" if setting == "target_modules" else "modules"
            raise InputError(f"lora.{setting}: found {target!r}; expected {what} of the model: {', '.join(ends)}")
        modules += matches
    return list(dict.fromkeys(modules))


def _is_tied_embedding(network: Network, module: nn.Module) -> bool:
    """True for an embedding or an output head whose weights the other one has too."""
    head, embedding = network.model.get_output_embeddings(), network.model.get_input_embeddings()
    return head is not None and module in (head, embedding) and head.weight.data_ptr() == embedding.weight.data_ptr()


def has_transposed_layers(network: Network) -> bool:
    """True if layers hold their matrices as [in, out], as GPT-2's do."""
    return any(isinstance(module, Conv1D) for module in network.model.modules())
