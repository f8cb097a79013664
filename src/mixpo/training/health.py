"""Alarms on a stage's metrics: signs of failed training, one line each with a remedy."""

from collections.abc import Mapping, Sequence

from mixpo.training.record import progress_listener

Rows = Sequence[Mapping[str, float]]

LEARNT_ACCURACY = 0.6
"""Accuracy on pairs from which a reward model counts as better than chance."""


def compute_mean_of_last_steps(metrics_rows: Rows, metric: str) -> float | None:
    """Mean of a metric over the last tenth of the steps that have it; None if no step has it."""
    values = [row[metric] for row in metrics_rows if row.get(metric) is not None]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def find_policy_alarms(metrics_rows: Rows, remedies_by_metric: Mapping[str, str]) -> list[str]:
    """Alarms, as texts, on a policy's training: completions do not end, do not vary, grow long or score equally."""
    alarms = []
    end_rate = compute_mean_of_last_steps(metrics_rows, "end_rate")
    if end_rate is None:
        end_rate = compute_mean_of_last_steps(metrics_rows, "sampled_end_rate")
    if end_rate is not None and end_rate < 0.5:
        alarms.append(f"only {end_rate:.0%} of the completions end by themselves: try {remedies_by_metric['end_rate']}")
    distinct = compute_mean_of_last_steps(metrics_rows, "distinct")
    if distinct is not None and distinct < 0.5:
        alarms.append(
            f"only {distinct:.0%} of the completions differ: the policy collapsed; try {remedies_by_metric['distinct']}"
        )
    for name, share, text in (
        ("entropy", 0.2, "the policy hardly varies"),
        ("score_std", 0.1, "all completions score alike"),
    ):
        first, last = _compute_first_and_last(metrics_rows, name)
        if first and last is not None and last < share * first:
            alarms.append(f"{name} fell from {first:.3g} to {last:.3g}: {text}; try {remedies_by_metric[name]}")
    first, last = _compute_first_and_last(metrics_rows, "completion_tokens")
    if first and last is not None and last > 2 * first:
        alarms.append(
            f"completions grew from {first:.0f} to {last:.0f} tokens: the reward may be for length; try "
            f"{remedies_by_metric['completion_tokens']}"
        )
    return alarms


def find_loss_alarms(metrics_rows: Rows, remedies: Sequence[str]) -> list[str]:
    """A list of one alarm, as text, if the loss, in nats a token, rose by more than 1 during training; else empty."""
    first, last = _compute_first_and_last(metrics_rows, "loss")
    if first is None or last is None or last <= first + 1:
        return []
    return [f"the loss rose from {first:.3g} to {last:.3g}: training diverged; try {' or '.join(remedies)}"]


def find_reward_model_alarms(test_accuracy: float, accuracy_low: float, *, train_accuracy: float | None) -> list[str]:
    """A list of one alarm, as text, unless the test accuracy's interval (95%) lies above 0.5; else empty."""
    if accuracy_low > 0.5:
        return []
    if test_accuracy >= LEARNT_ACCURACY:
        remedy = "more test pairs, so that the interval is narrower"
    elif train_accuracy is not None and train_accuracy >= LEARNT_ACCURACY:
        remedy = f"more or cleaner pairs, or fewer epochs: it is right on {train_accuracy:.0%} of the train pairs"
    else:
        remedy = "cleaner pairs, more epochs or a higher learning_rate"
    return [
        f"the reward model may be no better than chance (test accuracy {test_accuracy:.0%}, 95% CI from "
        f"{accuracy_low:.0%}), so arms may optimise noise; try {remedy}"
    ]


def emit_alarms(alarms: Sequence[str]) -> list[str]:
    """Send alarms to the progress listener, and return them as a list."""
    for alarm in alarms:
        progress_listener.get().on_message(f"alarm: {alarm}")
    return list(alarms)


def _compute_first_and_last(metrics_rows: Rows, metric: str) -> tuple[float | None, float | None]:
    """First value of a metric and its mean over the last tenth of the steps; None for both if no step has it."""
    first = next((row[metric] for row in metrics_rows if row.get(metric) is not None), None)
    return first, compute_mean_of_last_steps(metrics_rows, metric)
