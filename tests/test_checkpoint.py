"""A checkpoint: everything comes back bit for bit, and what is none is named in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mixpo.data.errors import InputError
from mixpo.training.checkpoint import Checkpoint, TrainableWeights
from mixpo.training.job import CHECKPOINT, StageJob
from mixpo.training.runtime import Runtime

RUNTIME = Runtime(device="cpu", threads=1, checkpoint_minutes=0)


class State:
    """Anything that a part of a checkpoint may hold."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_every_kind_of_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    state = {
        "state": {0: {"step": torch.tensor(7.0), "x": third}, 12: {}},
        "groups": [{"lr": 0.1 + 0.2, "betas": [0.9, 1e-300], "fused": True, "none": None, "params": [0, 12]}],
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        "empty": torch.zeros(0, 3),
        "nan": float("nan"),
        "huge": 2**80,
        "tensor": "a key like ours",
        "items": {"items": 1, "json": [[]]},
    }
    Checkpoint(StageJob(tmp_path, RUNTIME), {"part": State(state)}).write_checkpoint(5, {"errors": [0.1], "tensor": 1})
    torch.rand(3)
    back = State({})
    assert Checkpoint(StageJob(tmp_path, RUNTIME), {"part": back}).restore_states() == (
        5,
        {"errors": [0.1], "tensor": 1},
    )
    assert back.state.keys() == state.keys()
    assert back.state["state"].keys() == {0, 12}
    assert back.state["groups"] == state["groups"]
    assert back.state["items"] == state["items"]
    assert (back.state["huge"], back.state["tensor"]) == (2**80, "a key like ours")
    assert back.state["nan"] != back.state["nan"]
    for key in ("half", "empty"):
        assert torch.equal(back.state[key], state[key])
        assert back.state[key].dtype == state[key].dtype
    assert torch.equal(back.state["state"][0]["x"], third)
    assert back.state["state"][0]["step"].shape == ()


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """AdamW with dropout: weights, moments and the random state."""
    job = StageJob(tmp_path, RUNTIME)

    def made() -> tuple[nn.Module, torch.optim.Optimizer, Checkpoint]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95), fused=True)
        return model, optimizer, Checkpoint(job, {"m": TrainableWeights(model), "o": optimizer})

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()

    model, optimizer, checkpoint = made()
    steps(model, optimizer, 3)
    checkpoint.write_checkpoint_if_due(3, {})
    steps(model, optimizer, 3)
    again, other, checkpoint = made()
    assert checkpoint.restore_states() == (3, {})
    steps(again, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (tmp_path / "checkpoint.part").write_bytes(b"by a process that was killed")
    (tmp_path / "checkpoint-2").write_bytes(b"which is no folder")
    job.finish_stage()
    assert not (tmp_path / "checkpoint.part").exists()
    assert checkpoint.restore_states() == (0, {})


def test_a_checkpoint_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = Checkpoint(StageJob(tmp_path, RUNTIME), {"part": State({"x": torch.ones(2)})})
    checkpoint.write_checkpoint(1, {})
    good = load_file(tmp_path / CHECKPOINT)
    content = json.loads(bytes(good["json"].tolist()))

    def with_json(text: str) -> dict[str, torch.Tensor]:
        return {**good, "json": torch.tensor(list(text.encode()), dtype=torch.uint8)}

    damaged: list[bytes | dict[str, torch.Tensor]] = [
        b"",
        (tmp_path / CHECKPOINT).read_bytes()[:-9],
        {"weight": torch.ones(1)},
        with_json("[" * 50_000),
        with_json("[1, 2]"),
        with_json("9" * 5_000),
        with_json(json.dumps(content).replace('["format", 3]', '["format", 1]')),
        with_json(json.dumps(content).replace('"part"', '"model"')),
        {name: tensor for name, tensor in good.items() if name != "0"},
    ]
    torch.save({"format": 1, "step": 1, "parts": {}}, tmp_path / "checkpoint.pt")
    damaged.append((tmp_path / "checkpoint.pt").read_bytes())
    for one in damaged:
        if isinstance(one, bytes):
            (tmp_path / CHECKPOINT).write_bytes(one)
        else:
            save_file(one, tmp_path / CHECKPOINT)
        with pytest.raises(InputError, match=r"checkpoint\.safetensors: found no checkpoint of this stage \(") as error:
            checkpoint.restore_states()
        assert "\n" not in str(error.value)
        assert str(error.value).endswith("expected ['part'] in format 3; delete it to start the stage again")
