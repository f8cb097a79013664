"""Alarms on a stage's metrics: signs of failed training, one line each with a remedy."""

from collections.abc import Mapping, Sequence

from mixpo.training.record import progress_listener

Rows = Sequence[Mapping[str, float]]

LEARNT_ACCURACY = 0.6
"""Accuracy on pairs from which a reward model counts as better than chance."""


def compute_mean_of_last_steps(rows: Rows, name: str) -> float | None:
    """Mean of a metric over the last tenth of the steps that have it; None if no step has it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def find_policy_alarms(rows: Rows, remedies: Mapping[str, str]) -> list[str]:
    """Alarms on a policy's training: completions that do not end, do not vary, grow long, or have equal scores.

    `remedies` are the stage's settings to change, by the name of the metric.
    """
    alarms = []
    end_rate = compute_mean_of_last_steps(rows, "end_rate")
    if end_rate is None:
        end_rate = compute_mean_of_last_steps(rows, "sampled_end_rate")
    if end_rate is not None and end_rate < 0.5:
        alarms.append(f"only {end_rate:.0%} of the completions end by themselves: try {remedies['end_rate']}")
    distinct = compute_mean_of_last_steps(rows, "distinct")
    if distinct is not None and distinct < 0.5:
        alarms.append(
            f"only {distinct:.0%} of the completions differ: the policy collapsed; try {remedies['distinct']}"
        )
    for name, share, text in (
        ("entropy", 0.2, "the policy hardly varies"),
        ("score_std", 0.1, "all completions score alike"),
    ):
        first, last = _get_first_value(rows, name), compute_mean_of_last_steps(rows, name)
        if first and last is not None and last < share * first:
            alarms.append(f"{name} fell from {first:.3g} to {last:.3g}: {text}; try {remedies[name]}")
    first, last = _get_first_value(rows, "completion_tokens"), compute_mean_of_last_steps(rows, "completion_tokens")
    if first and last is not None and last > 2 * first:
        alarms.append(
            f"completions grew from {first:.0f} to {last:.0f} tokens: the reward may be for length; try "
            f"{remedies['completion_tokens']}"
        )
    return alarms


def find_loss_alarms(rows: Rows, remedies: Sequence[str]) -> list[str]:
    """An alarm if a loss, in nats a token, rose by more than 1: the probability of a token fell by a factor of e.

    Losses that are not finite stop the stage and need no alarm.
    """
    first, last = _get_first_value(rows, "loss"), compute_mean_of_last_steps(rows, "loss")
    if first is None or last is None or last <= first + 1:
        return []
    return [f"the loss rose from {first:.3g} to {last:.3g}: training diverged; try {' or '.join(remedies)}"]


def find_reward_model_alarms(accuracy: float, low: float, *, train_accuracy: float | None) -> list[str]:
    """An alarm if a reward model's accuracy on test pairs is not significantly above chance.

    `low` is the lower end of its 95% interval; `train_accuracy`, at the end of training, shows overfitting.
    """
    if low > 0.5:
        return []
    if accuracy >= LEARNT_ACCURACY:
        remedy = "more test pairs, so that the interval is narrower"
    elif train_accuracy is not None and train_accuracy >= LEARNT_ACCURACY:
        remedy = f"more or cleaner pairs, or fewer epochs: it is right on {train_accuracy:.0%} of the train pairs"
    else:
        remedy = "cleaner pairs, more epochs or a higher learning_rate"
    return [
        f"the reward model may be no better than chance (test accuracy {accuracy:.0%}, 95% CI from {low:.0%}), so arms "
        f"may optimise noise; try {remedy}"
    ]


def emit_alarms(alarms: Sequence[str]) -> list[str]:
    """Send alarms to the listener, and return them for the stage's summary."""
    for alarm in alarms:
        progress_listener.get().on_message(f"alarm: {alarm}")
    return list(alarms)


def _get_first_value(rows: Rows, name: str) -> float | None:
    """First value of a metric; None if no step has it."""
    return next((row[name] for row in rows if row.get(name) is not None), None)
