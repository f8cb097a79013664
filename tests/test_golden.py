"""The first steps of every trained stage against figures written down earlier: a refactor must not change them.

`python tests/test_golden.py` writes them down anew; that needs a reason in docs/log.md.
"""

import json
import tempfile
from pathlib import Path

import pytest

from worlds import World

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = {"sft": 20, "reward": 20, "dpo": 20, "ppo": 3, "rloo": 3}
"""Fewer where tokens are drawn: rounding on another processor draws another one before long (seen in the fourth)."""
WATCHED = {
    "sft": ("loss", "grad_norm"),
    "reward": ("loss", "grad_norm", "accuracy"),
    "dpo": ("loss", "grad_norm", "margin", "chosen_logprob", "rejected_logprob"),
    "ppo": ("score", "kl", "entropy", "grad_norm", "value_loss", "completion_tokens"),
    "rloo": ("score", "kl", "entropy", "grad_norm", "completion_tokens"),
}


def trajectory(world: World, kind: str) -> dict[str, list[float]]:
    stage = {
        "sft": lambda: world.sft,
        "reward": lambda: world.reward.model_copy(update={"batch_size": 12}),
        "dpo": lambda: world.dpo(epochs=10, learning_rate=1e-4),
        "ppo": lambda: world.ppo(epochs=4, minibatches=2),
        "rloo": lambda: world.ppo(epochs=4, advantage="rloo", completions_per_prompt=2),
    }[kind]()
    lines = (world.build(stage) / "metrics.jsonl").read_text().splitlines()[: STEPS[kind]]
    rows = [json.loads(line) for line in lines]
    return {name: [row[name] for row in rows] for name in WATCHED[kind]}


@pytest.mark.parametrize("kind", WATCHED)
def test_trajectory(world: World, kind: str) -> None:
    """Within 1%: other processors round otherwise, and twenty steps of Adam make that larger."""
    expected = json.loads(GOLDEN.read_text())[kind]
    found = trajectory(world, kind)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert len(values) == STEPS[kind]
        assert values == pytest.approx(expected[name], rel=0.01, abs=0.01), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        world = World(Path(cache))
        figures = {kind: trajectory(world, kind) for kind in WATCHED}
    rounded = {
        kind: {name: [float(f"{x:.6g}") for x in values] for name, values in found.items()}
        for kind, found in figures.items()
    }
    GOLDEN.write_text(json.dumps(rounded) + "\n")
