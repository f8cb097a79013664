"""The embedded recipe as it is: the world's calibration, and what the arms reach. Minutes long."""

from pathlib import Path

import pytest

from mixpo.experiments.recipe import read_recipe
from mixpo.experiments.results import load_runs, read_evaluation_summary
from mixpo.experiments.run import run_recipe
from mixpo.stages.stage_cache import read_stage_summary
from recording_display import RecordingDisplay


@pytest.mark.heavy
def test_the_world_is_calibrated_and_every_arm_improves(tmp_path: Path) -> None:
    run_recipe(read_recipe("world", [f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'run'}"]), RecordingDisplay())
    results = load_runs(tmp_path / "run")
    judged = results.list_stages_of_kind("RewardModel")[0].summary["test"]
    assert 0.70 <= judged["accuracy"] <= 0.80
    assert 0.35 <= judged["gap_under_1"] <= 0.60
    score, true_reward = (
        {arm.arm: read_evaluation_summary(arm)[key]["mean"] for arm in results.arms} for key in ("score", "true_reward")
    )
    assert score["sft"] < score["dpo"] < score["ppo"]
    assert score["dpo"] < score["mpo"]
    assert true_reward["sft"] < min(true_reward[arm] for arm in ("dpo", "ppo", "mpo"))
    peaks = [
        read_stage_summary(Path(place))["cost"]["peak_memory_mib"]
        for arm in results.arms
        for place in arm.stages.values()
    ]
    assert max(peaks) < 2048
