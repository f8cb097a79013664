"""Types in which frozen weights are held, and computing with them in float32 whatever they are held in."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mixpo.models.network import Network, iterate_matrix_modules


def freeze_network(network: Network) -> None:
    """Make all weights of a network untrainable, and hold them in the type in which it computes, in place.

    Results do not change. In bfloat16, matrices are held in it. Norms, scalar heads and the output head's bias, which
    are used in float32, are held in float32. Embeddings keep the type they came in, and are read in float32.
    """
    network.requires_grad_(False)
    if network.precision != "bfloat16":
        return
    model = network.model
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # of bitsandbytes
            module.compute_dtype = torch.bfloat16
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    narrow = set[int]()
    for _, module in iterate_matrix_modules(model):
        if module is not getattr(model, "score", None):
            narrow |= {id(part) for name, part in module.named_parameters() if module is not head or name == "weight"}
    narrow |= {id(weight) for weight in model.parameters() if weight.ndim == 3}  # all experts of a layer
    keeps_embedding = embedding.weight.dtype == torch.bfloat16
    # one weight that is still read from the mapped file would hold all of it in memory, as such an embedding does
    is_wide = not keeps_embedding and any(p.dtype == torch.float32 for p in model.parameters() if id(p) in narrow)
    held: dict[tuple[nn.Parameter, torch.dtype], nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if (module is embedding and keeps_embedding) or not weight.is_floating_point():
                continue
            dtype = torch.bfloat16 if id(weight) in narrow and module is not embedding else torch.float32
            if weight.dtype != dtype or is_wide:
                if (weight, dtype) not in held:
                    held[weight, dtype] = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
                setattr(module, name, held[weight, dtype])
    if keeps_embedding:
        embedding.register_forward_hook(lambda module, inputs, output: output.float())


@contextmanager
def compute_in_float32(model: nn.Module) -> Iterator[None]:
    """Context manager: a model computes in float32, one module's weights at a time, in whatever type it holds them."""
    handles = []
    for module in model.modules():
        held = {
            name: weight
            for name, weight in module.named_parameters(recurse=False)
            if weight.is_floating_point() and weight.dtype != torch.float32
        }
        if held:

            def widen(module: nn.Module, inputs: Any, held: Mapping[str, nn.Parameter] = held) -> None:
                """Put the weights into the module in float32."""
                for name, weight in held.items():
                    setattr(module, name, nn.Parameter(weight.float(), requires_grad=False))

            def restore(module: nn.Module, inputs: Any, output: Any, held: Mapping[str, nn.Parameter] = held) -> None:
                """Put the weights back as they are held."""
                for name, weight in held.items():
                    setattr(module, name, weight)

            handles += [
                module.register_forward_pre_hook(widen),
                module.register_forward_hook(restore, always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
