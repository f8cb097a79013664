"""Optimizers that take less of a GPU's memory than AdamW: its moments in CPU memory, or in 8 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments in its state."""


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments stay in CPU memory: a step takes those of one weight at a time to the weight's device.

    Results, and the state that is saved, are AdamW's.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take an optimizer step, one weight after the other."""
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    kept = {name: self.state[parameter][name] for name in MOMENTS if name in self.state[parameter]}
                    self.state[parameter].update({name: x.to(parameter.device) for name, x in kept.items()})
                    self.param_groups = [{**group, "params": [parameter]}]
                    super().step(closure)
                    self._return_moments(parameter, kept)
        finally:
            self.param_groups = groups

    def _return_moments(self, parameter: Tensor, kept: dict[str, Tensor]) -> None:
        """Write a weight's moments back to CPU memory, which is allocated (page-locked on a GPU) the first time."""
        state = self.state[parameter]
        for name in MOMENTS if parameter.grad is not None else ():
            if name not in kept:
                kept[name] = torch.empty_like(state[name], device="cpu", pin_memory=parameter.is_cuda)
            state[name] = kept[name].copy_(state[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; moments go to CPU memory without a way over the device, where they might not fit."""
        states = state_dict["state"]
        rest = {index: {name: x for name, x in state.items() if name not in MOMENTS} for index, state in states.items()}
        super().load_state_dict({**state_dict, "state": rest})
        for index, parameter in enumerate(parameter for group in self.param_groups for parameter in group["params"]):
            for name in MOMENTS if index in states else ():
                moment = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
                self.state[parameter][name] = moment.copy_(states[index][name])


def make_8bit_adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al. 2022), by bitsandbytes."""
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **settings)
    return optimizer
