"""Weights cut over the processes of a stage by PyTorch's `fully_shard`, and gathered where they are needed whole.

Every decoder layer is gathered for its own pass, the rest of the network for the whole pass. Sampling and scoring read
weights that were gathered before, since processes do not take the same number of passes there.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mixpo.models.language_model import LanguageModel


def shard_model(lm: LanguageModel, device: torch.device, process_count: int) -> None:
    """Cut a model's weights over all processes, in place; adapters and heads must be added before, optimizers after.

    In bfloat16 the layers' weights are gathered in it, and gradients are summed in float32. Scalar heads, embeddings
    and what else stands outside the layers are gathered as they are.
    """
    mesh = init_device_mesh(device.type, (process_count,))
    dtype = torch.bfloat16 if lm.precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layer_classes = set(lm.model._no_split_modules or ())
    for module in list(lm.modules()):
        if type(module).__name__ in layer_classes:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(lm, mesh=mesh)


@contextmanager
def gather_for_passes(lm: nn.Module) -> Iterator[None]:
    """Context manager in which passes without gradients need no other process; nothing happens to a whole model."""
    parts = [module for module in lm.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not lm, recurse=False)


@contextmanager
def gather_for_saving(lm: nn.Module, *, keep: bool) -> Iterator[None]:
    """Context manager in which a model holds its whole weights, on the CPU, where `keep`; called by every process."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in lm.modules():
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
