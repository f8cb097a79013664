"""Two arms side by side: which completions stand beside each other, and what is refused."""

import re

import pytest

from mixpo.data.errors import InputError
from mixpo.experiments.comparisons import choose_compared_seed, list_categories, pair_completions
from report_runs import SFT_SCORES, Arm, Writer, plain, scores

ARMS = {"sft": SFT_SCORES, "ppo": SFT_SCORES, "mpo": SFT_SCORES}
KINDS = ["helpful", None, "harmless", "helpful", None, "harmless"]


def test_every_prompt_has_both_completions_in_the_order_asked_for(tmp_path):
    results = Writer(tmp_path / "run", categories=KINDS).load(plain(ARMS))
    rows = pair_completions(results, ("mpo", "ppo"))
    assert [row.number for row in rows] == list(range(6))
    assert [row.completions for row in rows[1:]] == [(f"answer {n} of mpo", f"answer {n} of ppo") for n in range(1, 6)]
    assert [row.prompt[-1]["content"] for row in rows] == [f"question {n} & <b>more</b>" for n in range(6)]
    assert [row.category for row in rows] == KINDS
    assert list_categories(rows) == ["helpful", "harmless"]
    assert [row.is_identical for row in rows] == [True, *[False] * 5]


def test_a_draw_of_prompts_keeps_their_numbers_and_is_repeatable(tmp_path):
    results = Writer(tmp_path / "run").load(plain(ARMS))
    all_rows = pair_completions(results, ("mpo", "ppo"))
    drawn = pair_completions(results, ("mpo", "ppo"), prompt_count=3, draw_seed=1)
    assert drawn == pair_completions(results, ("mpo", "ppo"), prompt_count=3, draw_seed=1)
    assert drawn == [all_rows[row.number] for row in drawn]
    draws = [pair_completions(results, ("mpo", "ppo"), prompt_count=3, draw_seed=n) for n in range(9)]
    assert any(other != draws[0] for other in draws)
    assert pair_completions(results, ("mpo", "ppo"), max_prompts=3, draw_seed=1) == drawn
    assert pair_completions(results, ("mpo", "ppo"), max_prompts=99, draw_seed=1) == all_rows
    assert list_categories(drawn) == []


def test_a_larger_draw_holds_a_smaller_one(tmp_path):
    """Of 204 prompts, where Python's own sample of 20 is no part of its sample of 50."""
    results = Writer(tmp_path / "run").load(plain(dict.fromkeys(("sft", "mpo", "ppo"), [*SFT_SCORES] * 34)))
    some, more = ({row.number for row in pair_completions(results, ("mpo", "ppo"), prompt_count=n)} for n in (20, 50))
    assert some < more


def test_a_seed_at_which_both_finished(tmp_path):
    (sft,) = plain({"sft": SFT_SCORES}, seeds=(0, 1))
    ppo = Arm("ppo", {1: scores(SFT_SCORES)}, failed={0: "out of memory"})
    results = Writer(tmp_path / "run").load([sft, ppo])
    assert pair_completions(results, ("sft", "ppo")) == pair_completions(results, ("sft", "ppo"), seed=1)
    assert choose_compared_seed(results, ("sft", "ppo")) == 1
    with pytest.raises(InputError, match=r"found 0; expected one at which both sft and ppo finished: 1$"):
        pair_completions(results, ("sft", "ppo"), seed=0)


@pytest.mark.parametrize(
    ("arms", "prompts", "message"),
    [
        (("mpo", "mpo"), None, "--arms: found mpo twice; expected two different arms"),
        (("mpoo", "ppo"), None, "--arms: found 'mpoo'; expected two arms of the run; did you mean mpo?"),
        (("mpo", "dpo"), None, "--arms: found dpo, which failed: no memory; expected arms that finished; run it again"),
        (("mpo", "ppo"), 7, "--prompts: found 7; expected 1 to 6, the test prompts of this run"),
        (("mpo", "ppo"), 0, "--prompts: found 0; expected 1 to 6, the test prompts of this run"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, arms, prompts, message):
    results = Writer(tmp_path / "run").load([*plain(ARMS), Arm("dpo", failed={0: "no memory"})])
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        pair_completions(results, arms, prompt_count=prompts)
