"""Weights cut over the processes of a stage by PyTorch's `fully_shard`, and gathered where they are needed whole.

Every decoder layer is gathered for its own pass, the rest of the network for the whole pass. Sampling and scoring read
weights that were gathered before, since processes do not take the same number of passes there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mixpo.models.network import Network


def shard_module(module: nn.Module, device: torch.device, process_count: int) -> None:
    """Cut the weights of a network, or of a head that trains with it, over all processes, in place.

    Adapters that are added to it later stay whole. Where all weights train in bfloat16, the layers' weights are
    gathered in it, and gradients are summed in float32; all else is gathered as it is held.
    """
    mesh = init_device_mesh(device.type, (process_count,))
    if isinstance(module, Network):
        casts = module.precision == "bfloat16" and any(weight.requires_grad for weight in module.parameters())
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if casts else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        layer_classes = set(module.model._no_split_modules or ())
        for part in list(module.modules()):
            if type(part).__name__ in layer_classes:
                fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)


@contextmanager
def gather_for_passes(network: nn.Module) -> Iterator[None]:
    """Context manager in which passes without gradients need no other process; nothing happens to a whole model."""
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not network, recurse=False)


@contextmanager
def gather_for_saving(network: nn.Module, *, keep: bool) -> Iterator[None]:
    """Context manager in which a model holds its whole weights, on the CPU, where `keep`; called by every process."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if parameter not in whole:  # tied weights stay tied
                    tensor = parameter.detach().full_tensor()
                    whole[parameter] = nn.Parameter(tensor.cpu() if keep else tensor[:0], parameter.requires_grad)
                replaced.append((module, name, parameter))
    for module, name, parameter in replaced:
        module._parameters[name] = whole[parameter]
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def get_local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without a copy; the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def get_whole(tensor: Tensor) -> Tensor:
    """A whole tensor on the CPU from all processes' parts, by every process; the tensor itself if it is whole."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in every process, cut as a parameter is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients to a common norm of at most `max_norm`, in place; returns the norm before."""
    cut = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if not cut:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    norms = [nn.utils.get_total_norm([one.grad for one in kind if one.grad is not None]) for kind in (cut, whole)]
    norm = torch.stack([get_whole(part).float() for part in norms]).norm()
    for kind in (cut, whole):
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return float(norm)


class OptimizerStates:
    """States of an optimizer as a checkpoint's part; those of weights that are cut are cut again when restored."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore whole states, for the parameters in their order."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states = {
            index: {name: cut_like(x, parameters[index]) if isinstance(x, Tensor) else x for name, x in values.items()}
            for index, values in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": states})
