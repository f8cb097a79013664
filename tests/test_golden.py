"""The first steps of every trained stage against figures written down earlier: a refactor must not change them.

Nothing that they are computed from was drawn by a model: rounding on another processor would draw another token.
`python tests/test_golden.py` writes them down anew; that needs a reason in docs/log.md.
"""

import json
import tempfile
from pathlib import Path

import pytest

from worlds import World

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = 8
WATCHED = {
    "sft": ("loss", "grad_norm"),
    "reward": ("loss", "grad_norm"),
    "dpo": ("loss", "grad_norm", "margin", "chosen_logprob", "rejected_logprob"),
    "ppo": ("score", "kl", "entropy", "grad_norm", "value_loss", "completion_tokens"),
    "rloo": ("score", "kl", "entropy", "grad_norm", "completion_tokens"),
}


def trajectory(world: World, kind: str, out: Path, patch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    pairs = world.data.train_pairs
    stage = {
        "sft": lambda: world.sft,
        "reward": lambda: world.reward.model_copy(update={"batch_size": 12}),
        "dpo": lambda: world.dpo(learning_rate=1e-4, pairs=pairs),
        "ppo": lambda: world.ppo(epochs=0.5, minibatches=2, prompts=pairs),
        "rloo": lambda: world.ppo(epochs=0.5, advantage="rloo", completions_per_prompt=2, prompts=pairs),
    }[kind]()
    world.force_completions(patch)
    lines = (world.compute(stage, out) / "metrics.jsonl").read_text().splitlines()[:STEPS]
    rows = [json.loads(line) for line in lines]
    return {name: [row[name] for row in rows] for name in WATCHED[kind]}


@pytest.mark.parametrize("kind", WATCHED)
def test_trajectory(world: World, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1%: other processors round otherwise, and steps of Adam make that larger."""
    expected = json.loads(GOLDEN.read_text())[kind]
    found = trajectory(world, kind, tmp_path / kind, monkeypatch)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert len(values) == STEPS
        assert values == pytest.approx(expected[name], rel=0.01, abs=0.01), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        world = World(Path(cache) / "cache")
        figures = {kind: trajectory(world, kind, Path(cache) / kind, patch) for kind in WATCHED}
    rounded = {
        kind: {name: [float(f"{x:.6g}") for x in values] for name, values in found.items()}
        for kind, found in figures.items()
    }
    GOLDEN.write_text(json.dumps(rounded) + "\n")
