"""Checkpoints from which a stage resumes exactly where it was: safetensors and JSON, never a pickle.

All is in one file. Weights and moments that are cut over processes are in a folder beside it, to which every process
writes its own parts, and which the file names.
"""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixpo.data.errors import InputError
from mixpo.models.language_model import LanguageModel
from mixpo.training.job import CHECKPOINT, CHECKPOINT_SHARDS, CHECKPOINT_TEMPORARY, StageJob
from mixpo.training.optimizers import OffloadedAdamW
from mixpo.training.parallel import StageProcesses
from mixpo.training.sharding import get_local, make_sharded_tensor, read_shards, take_local_shard, write_shards

FORMAT = 3
_JSON = "json"
"""Name of the tensor whose bytes are the JSON of all values that are not tensors."""


class Stateful(Protocol):
    """Protocol of an object that a checkpoint can save: its state consists of tensors, numbers and texts."""

    def state_dict(self) -> dict[str, Any]:
        """The object's state, by name."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore the object to a state."""


class TrainableWeights:
    """Trainable weights of a model as a checkpoint's part; frozen ones are loaded from their folder instead."""

    def __init__(self, model: LanguageModel | nn.Module) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """The trainable weights by name, without a copy."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy these weights into the model. Raises RuntimeError unless the names are the same."""
        if state.keys() != self.parameters.keys():
            raise RuntimeError(f"the checkpoint's weights differ: {sorted(state.keys() ^ self.parameters.keys())[:3]}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                get_local(parameter.detach()).copy_(take_local_shard(state[name], parameter))


class OptimizerStates:
    """States of an optimizer as a checkpoint's part; those of weights that are cut are cut again when restored."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states of the parameters, in their order."""
        if not isinstance(self.optimizer, OffloadedAdamW):
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            states = {
                index: {name: _shard_like(value, parameters[index]) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            state = {**state, "state": states}
        self.optimizer.load_state_dict(state)


class LastGoodWeights:
    """A copy, on the CPU, of what this process has of a model's trainable weights, before an update may ruin them."""

    def __init__(self, weights: TrainableWeights, processes: StageProcesses) -> None:
        self.weights, self.processes = weights, processes
        self.step: int | None = None
        """Step before which the weights were copied."""
        self._copy = dict[str, Tensor]()
        self._copied_at = self._seconds = 0.0

    def copy_if_cheap(self, step: int) -> None:
        """Copy the weights before a step, unless that would take more than a hundredth of the time since the last copy.

        An adapter is thus copied at every step, and a model of many gigabytes now and then. Called by every process.
        """
        started = time.monotonic()
        is_soon = bool(self._copy) and started - self._copied_at < 100 * self._seconds
        if self.processes.take_from_main(lambda: is_soon):
            return
        for name, weight in self.weights.state_dict().items():
            if name in self._copy:
                self._copy[name].copy_(get_local(weight))
            else:
                self._copy[name] = get_local(weight).to("cpu", copy=True)
        self.step, self._copied_at = step, time.monotonic()
        self._seconds = self._copied_at - started

    def restore(self) -> None:
        """Put the copied weights back into the model, if there is a copy."""
        for name, weight in self._copy.items():
            get_local(self.weights.parameters[name].detach()).copy_(weight)


class Checkpoint:
    """The checkpoint file of a stage: states of its parts, random state, next step and extra values of the stage."""

    def __init__(self, job: StageJob, parts: Mapping[str, Stateful]) -> None:
        self.path = job.out / CHECKPOINT
        self.folder: Path | None = None
        """The folder of cut weights that the file names, if it has been read or written and names one."""
        self.parts = {
            name: OptimizerStates(part) if isinstance(part, torch.optim.Optimizer) else part
            for name, part in parts.items()
        }
        self.processes = job.processes
        self.every = 60 * job.runtime.checkpoint_minutes
        self.written = time.monotonic()

    def restore_states(self) -> tuple[int, dict[str, Any]]:
        """Restore from the file: (next step, extra values), or (0, {}) if none; called by every process.

        Raises `InputError` if it is damaged, or if the processes do not see the same one.
        """
        step, extra, own_error = 0, dict[str, Any](), None
        try:
            step, extra = self._read_states()
        except InputError as error:
            own_error = error
        steps, errors = zip(*self.processes.gather((step, own_error)), strict=True)
        for one in errors:
            if one is not None:  # in all processes at once, so that none waits for another
                raise one
        if len(set(steps)) > 1:
            raise InputError(
                f"{self.path}: found checkpoints before the steps {sorted(set(steps))} in the processes of one stage; "
                "expected one file system that all of them read; set `cache` to a folder there"
            )
        return step, extra

    def _read_states(self) -> tuple[int, dict[str, Any]]:
        """Restore the parts from the file, if there is one; returns (next step, extra values)."""
        if not self.path.exists():
            return 0, {}
        try:
            tensors = load_file(self.path)
            content = json.loads(tensors.pop(_JSON).numpy().tobytes())
            if content["cut"]:
                self.folder = self.path.with_name(content["folder"])
                sizes = {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in content["cut"].items()}
                count = self.processes.count if self.processes.is_sharded else 1
                tensors |= read_shards(sizes, self.folder, count)
            saved = _insert_tensors(content["state"], tensors)
            if saved["format"] != FORMAT or saved["parts"].keys() != self.parts.keys():
                raise ValueError(f"{sorted(saved['parts'])} in format {saved['format']}")
            for name, part in self.parts.items():
                part.load_state_dict(saved["parts"][name])
            torch.set_rng_state(saved["random_state"])
            if torch.cuda.is_available() and saved["cuda_random_state"] is not None:
                torch.cuda.set_rng_state(saved["cuda_random_state"])
            return int(saved["step"]), saved["extra"]
        except (
            *(SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
            AssertionError,  # of PyTorch, where files of parts do not say which parts they are
        ) as error:
            raise InputError(
                f"{self.path}: found no checkpoint of this stage ({type(error).__name__}: {str(error)[:200]}); "
                f"expected {sorted(self.parts)} in format {FORMAT}; delete it to start the stage again"
            ) from error

    def write_checkpoint_if_due(self, next_step: int, extra: Mapping[str, Any]) -> None:
        """Write the checkpoint before step `next_step` if `checkpoint_minutes` have passed since the last one.

        Called by every process; where weights are cut, all of them give their parts.
        """
        is_due = time.monotonic() - self.written >= self.every
        if self.processes.is_sharded:
            is_due = self.processes.take_from_main(lambda: is_due)
        if is_due and (self.processes.is_sharded or self.processes.is_main_process):
            self.write_checkpoint(next_step, extra)

    def write_checkpoint(self, next_step: int, extra: Mapping[str, Any]) -> None:
        """Write the checkpoint before step `next_step`, atomically: its file comes last, and its predecessor stays."""
        tensors: dict[str, Tensor] = {}
        state = {
            "format": FORMAT,
            "step": next_step,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "extra": dict(extra),
        }
        described = _extract_tensors(state, tensors)
        cut = {name: tensors.pop(name) for name in list(tensors) if isinstance(tensors[name], DTensor)}
        folder = self.path.with_name(f"{CHECKPOINT_SHARDS}{next_step}")
        if cut:
            self.processes.take_from_main(
                lambda: self._delete_shard_folders(keep=self.folder)
            )  # of attempts that ended here
            write_shards(cut, folder)
        self.written = time.monotonic()
        if not self.processes.is_main_process:
            return
        sizes = {name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in cut.items()}
        content = json.dumps({"state": described, "cut": sizes, "folder": folder.name}).encode()
        storages = set[int]()
        for name, tensor in tensors.items():
            if tensor.untyped_storage().data_ptr() in storages:  # safetensors wants one each; 8-bit states share some
                tensors[name] = tensor.clone()
            storages.add(tensor.untyped_storage().data_ptr())
        temporary = self.path.with_name(CHECKPOINT_TEMPORARY)
        save_file({_JSON: torch.frombuffer(bytearray(content), dtype=torch.uint8), **tensors}, temporary)
        temporary.replace(self.path)
        self.folder = folder if cut else None
        self._delete_shard_folders(keep=self.folder)

    def _delete_shard_folders(self, *, keep: Path | None) -> None:
        """Delete the folders of cut weights but one; what cannot be deleted, as where a copy is read, is left."""
        for folder in self.path.parent.glob(f"{CHECKPOINT_SHARDS}*"):
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)


def _shard_like(value: Any, parameter: nn.Parameter) -> Any:
    """A value of an optimizer's state, on the parameter's device and cut as it is if it is a tensor of its shape."""
    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape):
        return value
    return make_sharded_tensor(take_local_shard(value, parameter).to(parameter.device), parameter)


def _extract_tensors(state: Any, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON values, its tensors moved into `tensors`; mappings become lists of keys and values."""
    if isinstance(state, Tensor):
        tensors[str(len(tensors))] = state.detach().contiguous()
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(state, Mapping):
        return {"items": [[key, _extract_tensors(value, tensors)] for key, value in state.items()]}
    if isinstance(state, list | tuple):
        return [_extract_tensors(value, tensors) for value in state]
    return state


def _insert_tensors(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state of these JSON values, its tensors taken from `tensors`; tuples have become lists."""
    if isinstance(state, list):
        return [_insert_tensors(value, tensors) for value in state]
    if isinstance(state, dict):
        if "tensor" in state:
            return tensors[state["tensor"]]
        return {key: _insert_tensors(value, tensors) for key, value in state["items"]}
    return state
