"""Optimizers that take less memory: the same weights as AdamW's, or as AdamW's formula with rounded moments."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixpo.training.checkpoint import Checkpoint, TrainableWeights
from mixpo.training.job import StageJob
from mixpo.training.optimizers import OffloadedAdamW
from mixpo.training.runtime import Runtime
from mixpo.training.step import OptimizerSettings, make_optimizer

PLAIN = OptimizerSettings(learning_rate=1e-3, weight_decay=0.1)
IN_8_BITS = PLAIN.model_copy(update={"optimizer": "adamw-8bit"})
WIDTH = 80
"""A weight of so many rows and columns has more than 4096 numbers: fewer are never kept in 8 bits."""


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def flatten(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


Make = Callable[[nn.Module], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "offloaded": lambda model: make_optimizer(model.parameters(), PLAIN, offload=True),
    "8 bits": lambda model: make_optimizer(model.parameters(), IN_8_BITS),
}


def test_offloaded_moments_train_as_those_of_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the moments of one weight at a time leave the CPU."""
    model, other = make_model(), make_model()
    optimizer, plain = (
        make_optimizer(model.parameters(), PLAIN, offload=True),
        make_optimizer(other.parameters(), PLAIN),
    )
    stepped, original = [], torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, closure: None = None) -> Any:
        stepped.append([len(group["params"]) for group in optimizer.param_groups])
        return original(optimizer, closure)

    train(other, plain, range(5))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(model, optimizer, range(5))
    assert torch.equal(flatten(model), flatten(other))
    assert stepped == [[1]] * 6 * 5
    assert isinstance(optimizer, OffloadedAdamW)
    kept = [optimizer.state[parameter]["exp_avg"].data_ptr() for parameter in model.parameters()]
    train(model, optimizer, range(1))
    assert kept == [optimizer.state[parameter]["exp_avg"].data_ptr() for parameter in model.parameters()]


def test_offloaded_moments_are_saved_as_those_of_adamw() -> None:
    """So that the setting may change before a stage resumes."""
    model, other = make_model(), make_model()
    optimizer, plain = (
        make_optimizer(model.parameters(), PLAIN),
        make_optimizer(other.parameters(), PLAIN, offload=True),
    )
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    plain.load_state_dict(deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 5))
    train(other, plain, range(3, 5))
    assert torch.equal(flatten(model), flatten(other))
    assert plain.state_dict().keys() == optimizer.state_dict().keys()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_checkpoint_holds_the_moments(make: Make, tmp_path: Path) -> None:
    def resume() -> tuple[nn.Module, torch.optim.Optimizer, Checkpoint]:
        model = make_model()
        optimizer = make(model)
        job = StageJob(tmp_path, Runtime(device="cpu", threads=1))
        return model, optimizer, Checkpoint(job, {"model": TrainableWeights(model), "optimizer": optimizer})

    model, optimizer, checkpoint = resume()
    train(model, optimizer, range(3))
    checkpoint.write_checkpoint(3, {})
    train(model, optimizer, range(3, 6))
    resumed, optimizer, checkpoint = resume()
    assert checkpoint.restore_states()[0] == 3
    train(resumed, optimizer, range(3, 6))
    assert torch.equal(flatten(model), flatten(resumed))


def test_moments_in_8_bits_train_and_resume() -> None:
    """Near AdamW, not equal to it, in a quarter of the memory; vectors, which are few, stay in 32 bits."""
    model, other = make_model(), make_model()
    optimizer = MAKERS["8 bits"](model)
    train(model, optimizer, range(5))
    train(other, make_optimizer(other.parameters(), PLAIN), range(5))
    difference = (flatten(model) - flatten(other)).abs()
    moved = (flatten(other) - flatten(make_model())).abs()
    assert 0 < difference.mean() < 0.2 * moved.mean()
    saved = [x for state in optimizer.state_dict()["state"].values() for x in _list_tensors(state)]
    moments = [x.dtype for x in saved if x.shape == (WIDTH, WIDTH)]
    assert moments == [torch.uint8] * 4


def _list_tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [x for value in state.values() for x in _list_tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []
