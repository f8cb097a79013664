"""Alarms: each raised by what it is for, and none by a healthy stage."""

import pytest

from mixpo.stages.ppo_settings import PPOSettings, suggest_ppo_remedies, suggest_remedies_by_metric
from mixpo.training.health import (
    compute_mean_of_last_steps,
    find_loss_alarms,
    find_policy_alarms,
    find_reward_model_alarms,
)
from mixpo.training.step import OptimizerSettings, suggest_divergence_remedies

HEALTHY = {"end_rate": 0.97, "distinct": 0.9, "entropy": 1.0, "score_std": 1.2, "completion_tokens": 30.0}


def course(**end: float) -> list[dict[str, float]]:
    """Twenty steps, the last half of them ending as told."""
    return [dict(HEALTHY) for _ in range(10)] + [HEALTHY | end for _ in range(10)]


def test_no_alarm_for_a_healthy_stage() -> None:
    assert find_policy_alarms(course(), {}) == []
    assert find_policy_alarms([], {}) == []
    assert find_reward_model_alarms(0.7, 0.66, train_accuracy=0.8) == []


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({"end_rate": 0.2}, "only 20% of the completions end by themselves"),
        ({"distinct": 0.1}, "only 10% of the completions differ: the policy collapsed"),
        ({"entropy": 0.05}, "entropy fell from 1 to 0.05"),
        ({"score_std": 0.01}, "score_std fell from 1.2 to 0.01"),
        ({"completion_tokens": 80.0}, "completions grew from 30 to 80 tokens"),
    ],
)
def test_each_alarm(end: dict[str, float], expected: str) -> None:
    (name,) = end
    (alarm,) = find_policy_alarms(course(**end), {name: "what the stage has against it"})
    assert alarm.startswith(expected)
    assert alarm.endswith(("; try what the stage has against it", ": try what the stage has against it"))


def test_dpo_draws_samples_at_some_steps_only() -> None:
    rows = [{"loss": 0.6}, {"sampled_end_rate": 1.0}, {"sampled_end_rate": 0.1}, {"loss": 0.3}]
    (alarm,) = find_policy_alarms(rows, {"end_rate": "a higher beta"})
    assert alarm == "only 10% of the completions end by themselves: try a higher beta"


def test_a_loss_that_ends_above_its_beginning() -> None:
    def rows(*losses: float) -> list[dict[str, float]]:
        return [{"loss": loss} for loss in losses for _ in range(10)]

    assert find_loss_alarms([], []) == find_loss_alarms(rows(2.0, 9.0, 2.9), []) == []
    (alarm,) = find_loss_alarms(rows(2.0, 1.5, 3.1), ["a lower learning_rate", "precision: float32"])
    assert alarm == "the loss rose from 2 to 3.1: training diverged; try a lower learning_rate or precision: float32"


@pytest.mark.parametrize(
    ("accuracy", "low", "train_accuracy", "remedy"),
    [
        (0.52, 0.47, 0.55, "cleaner pairs, more epochs or a higher learning_rate"),
        (0.52, 0.47, None, "cleaner pairs, more epochs or a higher learning_rate"),
        (0.52, 0.47, 0.97, "more or cleaner pairs, or fewer epochs: it is right on 97% of the train pairs"),
        (0.70, 0.39, 0.72, "more test pairs, so that the interval is narrower"),
    ],
)
def test_a_reward_model_at_chance(accuracy: float, low: float, train_accuracy: float | None, remedy: str) -> None:
    (alarm,) = find_reward_model_alarms(accuracy, low, train_accuracy=train_accuracy)
    figures = f"(test accuracy {accuracy:.0%}, 95% CI from {low:.0%})"
    assert alarm.startswith(f"the reward model may be no better than chance {figures}")
    assert alarm.endswith(f"; try {remedy}")


@pytest.mark.parametrize(
    ("settings", "anchor"),
    [
        ({}, "a higher kl_coef (now 0.1)"),
        ({"kl_target": 6}, "a lower kl_target (now 6)"),
        ({"kl_budget": 2.5}, "a lower kl_budget (now 2.5)"),
    ],
)
def test_ppo_advises_what_acts_on_its_anchor(settings: dict[str, float], anchor: str) -> None:
    """kl_target and kl_budget change kl_coef themselves."""
    suggestions = suggest_remedies_by_metric(PPOSettings(**settings, missing_end_penalty=2.0))
    assert suggestions.keys() == {*HEALTHY}
    assert all(suggestions[name].startswith(anchor) for name in suggestions.keys() - {"end_rate"})
    assert suggestions["end_rate"] == "a higher max_completion_tokens (now 512) or missing_end_penalty (now 2)"


@pytest.mark.parametrize(
    ("step", "settings", "expected"),
    [
        (0, {}, "another model or other rows, since nothing was trained before or more value_warmup_steps (now 0)"),
        (5, {}, "a lower learning_rate (now 3e-06) or a higher kl_coef (now 0.1) or more value_warmup_steps (now 0)"),
        (5, {"value_warmup_steps": 9}, "a lower learning_rate (now 3e-06) or a higher kl_coef (now 0.1)"),
        (
            5,
            {"advantage": "rloo", "completions_per_prompt": 2, "kl_target": 3},
            "a lower learning_rate (now 3e-06) or a lower kl_target (now 3)",
        ),
    ],
)
def test_ppo_advises_what_can_help_against_a_divergence(step: int, settings: dict[str, float], expected: str) -> None:
    assert suggest_ppo_remedies(PPOSettings(**settings), list(range(11)), step) == expected


@pytest.mark.parametrize(
    ("step", "warmup", "precision", "expected"),
    [
        (0, 0, "float32", ["another model or other rows, since nothing was trained before"]),
        (0, 0, "bfloat16", ["another model or other rows, since nothing was trained before", "precision: float32"]),
        (3, 2, "float32", ["a lower learning_rate (now 0.001)", "more warmup_steps (now 2)"]),
        (3, 2, "bfloat16", ["a lower learning_rate (now 0.001)", "more warmup_steps (now 2)", "precision: float32"]),
        (9, 2, "float32", ["a lower learning_rate (now 0.001)", "more warmup_steps (now 2)"]),  # the first tenth
        (10, 2, "float32", ["a lower learning_rate (now 0.001)"]),
        (90, 2, "float32", ["a lower learning_rate (now 0.001)"]),  # long after the warm-up
        (30, 70, "float32", ["a lower learning_rate (now 0.001)"]),  # half of all steps are its most
    ],
)
def test_a_divergence_is_met_by_what_can_act(step: int, warmup: int, precision: str, expected: list[str]) -> None:
    settings = OptimizerSettings(learning_rate=1e-3, warmup_steps=warmup, precision=precision)
    assert suggest_divergence_remedies(step, total_steps=100, settings=settings) == expected


def test_mean_of_last_is_over_the_last_tenth() -> None:
    rows = [{"x": float(value)} for value in range(30)]
    assert compute_mean_of_last_steps(rows, "x") == 28.0
    assert compute_mean_of_last_steps(rows, "y") is None
