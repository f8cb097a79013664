"""Alarms: what somebody who reads a stage's curves would stop at, in one line each with what to try."""

from collections.abc import Mapping, Sequence

from mixpo.training.record import watcher

Rows = Sequence[Mapping[str, float]]

LEARNT_ACCURACY = 0.6
"""Accuracy on pairs from which on a reward model has learnt something."""


def mean_of_last_steps(rows: Rows, name: str) -> float | None:
    """The mean of a metric over the last tenth of the steps that have it; None where none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def policy_alarms(rows: Rows, remedies: Mapping[str, str]) -> list[str]:
    """Alarms on a policy's training: completions that do not end, are all alike, grow, or all score the same.

    `remedies` says what the stage has against each, by the name of the metric.
    """
    found = []
    ended = mean_of_last_steps(rows, "end_rate")
    if ended is None:
        ended = mean_of_last_steps(rows, "sampled_end_rate")
    if ended is not None and ended < 0.5:
        found.append(f"only {ended:.0%} of the completions end by themselves: try {remedies['end_rate']}")
    distinct = mean_of_last_steps(rows, "distinct")
    if distinct is not None and distinct < 0.5:
        found.append(f"only {distinct:.0%} of the completions differ: the policy collapsed; try {remedies['distinct']}")
    for name, share, text in (
        ("entropy", 0.2, "the policy hardly varies"),
        ("score_std", 0.1, "all completions score alike"),
    ):
        first, last = _first(rows, name), mean_of_last_steps(rows, name)
        if first and last is not None and last < share * first:
            found.append(f"{name} fell from {first:.3g} to {last:.3g}: {text}; try {remedies[name]}")
    first, last = _first(rows, "completion_tokens"), mean_of_last_steps(rows, "completion_tokens")
    if first and last is not None and last > 2 * first:
        found.append(
            f"completions grew from {first:.0f} to {last:.0f} tokens: the reward may be for length; try "
            f"{remedies['completion_tokens']}"
        )
    return found


def loss_alarms(rows: Rows, remedies: Sequence[str]) -> list[str]:
    """An alarm on a loss in nats a token that ends more than 1 above its beginning: each token is e times less likely.

    Losses that are not finite need none: they stop the stage.
    """
    first, last = _first(rows, "loss"), mean_of_last_steps(rows, "loss")
    if first is None or last is None or last <= first + 1:
        return []
    return [f"the loss rose from {first:.3g} to {last:.3g}: training diverged; try {' or '.join(remedies)}"]


def reward_model_alarms(accuracy: float, low: float, *, train_accuracy: float | None) -> list[str]:
    """An alarm on a reward model whose accuracy on test pairs, or its interval's lower end, is not above chance.

    `train_accuracy`, at the end of training, tells a model that learnt its pairs by heart from one that learnt nothing.
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
        f"test accuracy {accuracy:.0%} is not above chance (its interval starts at {low:.0%}): what is optimised for "
        f"this score may be noise; try {remedy}"
    ]


def emit_alarms(alarms: Sequence[str]) -> list[str]:
    """Tell whoever watches, and hand the alarms on for the stage's summary."""
    for alarm in alarms:
        watcher.get().note(f"alarm: {alarm}")
    return list(alarms)


def _first(rows: Rows, name: str) -> float | None:
    return next((row[name] for row in rows if row.get(name) is not None), None)
