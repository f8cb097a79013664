"""Optimizers that take less of a GPU's memory than AdamW: its moments in CPU memory, or in 8 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixpo.training.sharding import get_local, make_sharded_tensor, take_local_shard

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments in its state."""


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments stay in CPU memory: a step takes those of one weight at a time to the weight's device.

    Of weights that are cut over processes, each has its own part. Results, and the state that is saved, are AdamW's.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take an optimizer step, one weight after the other."""
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_one(parameter, parameter.grad, group)
        finally:
            self.param_groups = groups

    def _step_one(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take the step of what this process has of one weight."""
        part = nn.Parameter(get_local(parameter.detach()))
        part.grad = get_local(gradient)
        saved = self.state[parameter]
        self.state[part] = {name: get_local(x).to(part.device) if name in MOMENTS else x for name, x in saved.items()}
        self.param_groups = [{**group, "params": [part]}]
        super().step()
        for name, value in self.state.pop(part).items():
            if name in MOMENTS:
                self._write_moment(parameter, name, value)
            else:
                saved[name] = value

    def _write_moment(self, parameter: nn.Parameter, name: str, part: Tensor) -> None:
        """Write a weight's moment to CPU memory, which is allocated (page-locked on a GPU) the first time."""
        saved = self.state[parameter]
        if name not in saved:
            kept = torch.empty_like(part, device="cpu", pin_memory=parameter.is_cuda)
            saved[name] = make_sharded_tensor(kept, parameter)
        get_local(saved[name]).copy_(part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; moments go to CPU memory without a way over the device, where they might not fit."""
        states = state_dict["state"]
        rest = {index: {name: x for name, x in state.items() if name not in MOMENTS} for index, state in states.items()}
        super().load_state_dict({**state_dict, "state": rest})
        for index, parameter in enumerate(parameter for group in self.param_groups for parameter in group["params"]):
            for name in MOMENTS if index in states else ():
                self._write_moment(parameter, name, take_local_shard(states[index][name], parameter))


def make_8bit_adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al. 2022), by bitsandbytes."""
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **settings)
    return optimizer
