"""The arms: which stages each is made of. Nothing is trained here."""

import pytest

from mixpo.data.errors import InputError
from mixpo.experiments.arms import ARMS
from mixpo.experiments.recipe import read_recipe
from mixpo.experiments.shared_stages import SharedStages


def test_every_arm_is_its_expression() -> None:
    """What each arm's last stage starts from, is anchored to and learns from, by hand."""
    shared = SharedStages(read_recipe("world"), 0)
    easy, hard, everything = shared.selection.easy_pairs, shared.selection.hard_pairs, shared.samples.pairs
    made = {name: arm(shared) for name, arm in ARMS.items()}
    pairs = [made[name].pairs for name in ("dpo-base", "dpo", "dpo-easy", "dpo-hard")]
    assert pairs == [shared.data.train_pairs, everything, easy, hard]
    assert [made[name].prompts for name in ("ppo", "ppo-easy", "ppo-hard")] == [everything, easy, hard]
    for name in ("dpo-base", "dpo", "dpo-easy", "dpo-hard", "ppo", "ppo-easy", "ppo-hard"):
        assert made[name].policy == made[name].reference == shared.sft
    for name in ("mpo", "mpo-rloo", "mpo-grpo"):
        assert made[name].policy == made[name].reference == made["dpo-easy"]
        assert made[name].prompts == hard
    assert (made["mpo-sft-kl"].policy, made["mpo-sft-kl"].reference) == (made["dpo-easy"], shared.sft)
    for name, anchor in (("mpo-reverse", made["ppo-hard"]), ("mpo-reverse-sft", shared.sft)):
        assert (made[name].policy, made[name].reference, made[name].pairs) == (made["ppo-hard"], anchor, easy)
    assert (made["best-of-n"].policy, made["best-of-n"].best_of) == (shared.sft, 16)
    assert made["sft"] == shared.sft
    checked = "sft best-of-n dpo-base dpo dpo-easy dpo-hard ppo ppo-easy ppo-hard mpo mpo-rloo mpo-grpo mpo-sft-kl"
    assert set(ARMS) == {*checked.split(), "mpo-reverse", "mpo-reverse-sft"}, "a new arm has its line above"


def test_grouped_arms_sample_as_many_completions_as_ppo() -> None:
    shared = SharedStages(read_recipe("world", ["group_size=4"]), 0)
    for name in ("mpo-rloo", "mpo-grpo"):
        grouped, plain = ARMS[name](shared), ARMS["mpo"](shared)
        assert grouped.advantage == name.removeprefix("mpo-")
        assert grouped.batch_size * grouped.completions_per_prompt == plain.batch_size
        assert grouped.epochs * grouped.completions_per_prompt == plain.epochs
    with pytest.raises(InputError, match=r"group_size: found 5; expected a divisor of ppo.batch_size, 128"):
        ARMS["mpo-rloo"](SharedStages(read_recipe("world", ["group_size=5"]), 0))
