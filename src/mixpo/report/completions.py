"""Every arm's completions of the test prompts, side by side."""

from mixpo.data.rows import convert_to_messages
from mixpo.experiments.results import Results, read_completions
from mixpo.report.arms import choose_headline_arms
from mixpo.report.comparison import format_count
from mixpo.report.document import ArmCompletion, PromptCompletions

MAX_PROMPTS = 256
"""Prompts in the report."""
SCORES = {"score": "score", "true_reward": "r*", "second_score": "second score"}
"""Columns of an evaluation, and their names beside a completion."""


def collect_prompt_completions(results: Results) -> list[PromptCompletions]:
    """Up to 256 test prompts, each with the completions of the arms that finished the seed at which most arms did."""
    seed = _choose_completions_seed(results)
    by_arm = {arm.name: read_completions(arm) for arm in results.arms if arm.status == "done" and arm.seed == seed}
    prompts = []
    for number, rows in enumerate(list(zip(*by_arm.values(), strict=True))[:MAX_PROMPTS], 1):
        *earlier, last = convert_to_messages(rows[0]["prompt"])
        completions = [
            ArmCompletion(arm, row["completion"], {name: row[key] for key, name in SCORES.items() if key in row})
            for arm, row in zip(by_arm, rows, strict=True)
        ]
        prompts.append(PromptCompletions(number, earlier, last["content"], completions))
    return prompts


def _choose_completions_seed(results: Results) -> int:
    """The first of the seeds at which most arms finished."""
    finished = [results.get_finished_by_seed(name) for name in results.finished_arms]
    return max(results.seeds, key=lambda seed: sum(seed in by_seed for by_seed in finished))


def describe_shown_completions(results: Results, prompts: list[PromptCompletions]) -> str:
    """The numbers of prompts and arms shown, and on how many prompts one compared arm scores above the other."""
    if not prompts:
        return "No arm finished, so there are no completions."
    seed = _choose_completions_seed(results)
    arms = format_count(len(prompts[0].completions), "arm")
    text = f"Completions of {arms} for the first {format_count(len(prompts), 'test prompt')}, at seed {seed}"
    scores = [{completion.arm: completion.scores["score"] for completion in prompt.completions} for prompt in prompts]
    pair = choose_headline_arms(results)
    if pair is None or seed not in results.list_seeds_with_same_scorer("score", *pair):
        return f"{text}."
    one, other = pair
    higher = sum(score[one] > score[other] for score in scores)
    lower = sum(score[one] < score[other] for score in scores)
    return f"{text}. {one} scores higher than {other} on {higher} of them and lower on {lower}."
