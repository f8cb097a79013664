"""Alarms: each raised by what it is for, and none by a healthy stage."""

import pytest

from mixpo.training.health import mean_of_last, policy_alarms, reward_model_alarms

HEALTHY = {"end_rate": 0.97, "distinct": 0.9, "entropy": 1.0, "score_std": 1.2, "completion_tokens": 30.0}


def course(**end: float) -> list[dict[str, float]]:
    """Twenty steps, the last half of them ending as told."""
    return [dict(HEALTHY) for _ in range(10)] + [HEALTHY | end for _ in range(10)]


def test_no_alarm_for_a_healthy_stage() -> None:
    assert policy_alarms(course()) == []
    assert policy_alarms([]) == []
    assert reward_model_alarms(0.7, 0.66) == []


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
    (alarm,) = policy_alarms(course(**end))
    assert alarm.startswith(expected)


def test_dpo_draws_samples_at_some_steps_only() -> None:
    rows = [
        {"loss": 0.6},
        {"loss": 0.5, "sampled_end_rate": 1.0},
        {"loss": 0.4, "sampled_end_rate": 0.1},
        {"loss": 0.3},
    ]
    (alarm,) = policy_alarms(rows)
    assert alarm.startswith("only 10% of the completions end")


def test_a_reward_model_at_chance() -> None:
    (alarm,) = reward_model_alarms(0.52, 0.47)
    assert alarm.startswith("test accuracy 52% is not above chance (its interval starts at 47%)")


def test_mean_of_last_is_over_the_last_tenth() -> None:
    rows = [{"x": float(value)} for value in range(30)]
    assert mean_of_last(rows, "x") == 28.0
    assert mean_of_last(rows, "y") is None
