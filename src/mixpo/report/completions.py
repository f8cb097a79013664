"""What do they say? Every arm's completions of the test prompts, side by side."""

from mixpo.data.rows import as_messages
from mixpo.experiments.results import Results, read_completions
from mixpo.report.arms import compared
from mixpo.report.comparison import counted
from mixpo.report.document import ArmCompletion, Asked, Turn

MOST = 256
"""Prompts shown."""


def asked(results: Results) -> list[Asked]:
    """The first test prompts with the completions of the arms that finished the seed of `_seed`."""
    seed = _seed(results)
    rows = {arm.name: read_completions(arm) for arm in results.arms if arm.status == "done" and arm.seed == seed}
    if not rows:
        return []
    shown = []
    for number, row in enumerate(next(iter(rows.values()))[:MOST]):
        *earlier, last = [Turn(**message) for message in as_messages(row["prompt"])]
        said = [
            ArmCompletion(arm, one["completion"], one["score"], one.get("true_reward"), one.get("second_score"))
            for arm, one in ((arm, found[number]) for arm, found in rows.items())
        ]
        shown.append(Asked(number + 1, earlier, last.content, said))
    return shown


def _seed(results: Results) -> int:
    """The first seed at which most arms finished."""
    return max(results.seeds, key=lambda seed: sum(seed in results.done(name) for name in results.finished))


def opening(results: Results, asked: list[Asked]) -> str:
    """What they are, and on how many the compared arms differ."""
    if not asked:
        return "No arm finished, so there are no completions."
    arms = counted(len(asked[0].completions), "arm")
    said = f"The first {counted(len(asked), 'test prompt')}, and completions of {arms} at seed {_seed(results)}"
    scores = [{shown.arm: shown.score for shown in one.completions} for one in asked]
    pair = compared(results)
    if pair is None or _seed(results) not in results.comparable("score", *pair):
        return f"{said}."
    one, other = pair
    higher = sum(score[one] > score[other] for score in scores)
    lower = sum(score[one] < score[other] for score in scores)
    return f"{said}; the score of {one} is above that of {other} on {higher} of them and below it on {lower}."
