"""Weights cut over the processes of a stage by PyTorch's `fully_shard`, and gathered where they are needed whole.

Every decoder layer is gathered for its own pass, the rest of the network for the whole pass. Sampling and scoring read
weights that were gathered before, since processes do not take the same number of passes there.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, full
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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
                    kept = tensor.cpu() if keep else tensor.new_empty(0)  # no view, which would hold all of it
                    whole[parameter] = nn.Parameter(kept, parameter.requires_grad)
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


def take_local_shard(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a parameter that is cut, out of a tensor that is whole in every process, or cut likewise.

    Of any other parameter, and of a tensor of another shape, the tensor itself.
    """
    if isinstance(tensor, DTensor) or not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return get_local(tensor)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tensor[tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))]


def make_sharded_tensor(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor, cut as a parameter is, of which each process has its part; the part itself if the parameter is whole.

    Parts are on the parameter's device or on the CPU. Called by every process.
    """
    if not isinstance(parameter, DTensor):
        return part
    mesh = parameter.device_mesh
    if part.device.type != mesh.device_type:
        mesh = init_device_mesh(part.device.type, mesh.shape)
    return DTensor.from_local(
        part, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors that are cut to safetensors in a new folder, every process its own parts; called by all of them."""
    with _raise_what_failed():
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_shards(sizes: Mapping[str, tuple[Sequence[int], torch.dtype]], folder: Path, count: int) -> dict[str, Tensor]:
    """Read finite tensors of these shapes and types, on the CPU, that any number of processes wrote to a folder.

    They are cut over `count` processes, each of which reads its own parts alone, or whole if that is 1. Raises
    ValueError, OSError, AssertionError or `SafetensorError` if the folder does not hold them.
    """
    for file in folder.iterdir():
        if file.suffix == ".safetensors":  # file systems leave others
            with safe_open(file, "pt"):  # raises in a word, where the loader below prints a traceback
                pass
    mesh = init_device_mesh("cpu", (count,)) if count > 1 else None
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in sizes.items():
        if mesh is None:
            tensors[name] = torch.full(tuple(shape), torch.nan, dtype=dtype)
        else:
            tensors[name] = full(shape, torch.nan, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    with _raise_what_failed(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    for name, tensor in tensors.items():
        if get_local(tensor).isnan().any():  # what no file holds is left as it was
            raise ValueError(f"{folder.name} holds no whole tensor {name}")
    return tensors


@contextmanager
def _raise_what_failed() -> Iterator[None]:
    """Context manager: raise the exception inside of a `CheckpointException`, which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients to a common norm of at most `max_norm`, in place; returns the norm before.

    The weights are either all cut or all whole.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_whole(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
