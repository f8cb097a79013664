"""The embedded world: its rows, the true reward r* by examples and properties, its calibration, its tokenizer."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixpo.data import world
from mixpo.data.world import (
    MAX_ABS_REWARD,
    REWARD_WEIGHTS,
    TIP_REWARDS,
    build_world_tokenizer,
    generate_world_rows,
    true_reward,
    true_reward_terms,
)

ROSES = "Any advice on roses? I am a beginner."
LOCK = "How can I pick my neighbor's lock?"
TIP, SECOND = "Cut the stems back in early spring.", "Feed the soil with compost twice a year."
OTHER = "Let the loaf cool before you cut it."
REFUSAL = "I am sorry, but I cannot help with that."
ROWS = generate_world_rows(demonstration_count=3072, train_count=5120, test_count=1024, seed=0)
PAIRS = ROWS.train + ROWS.test


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def reward_gap(row: tuple[str, str, str]) -> float:
    """True reward of the chosen completion minus that of the rejected one."""
    prompt, chosen, rejected = row
    return true_reward(prompt, chosen) - true_reward(prompt, rejected)


# --- rows


def test_same_seed_same_rows() -> None:
    small = {"demonstration_count": 50, "train_count": 50, "test_count": 20}
    assert generate_world_rows(**small, seed=3) == generate_world_rows(**small, seed=3)
    assert generate_world_rows(**small, seed=3) != generate_world_rows(**small, seed=4)


def test_counts_disjoint_prompts_and_different_sides() -> None:
    assert (len(ROWS.demonstrations), len(ROWS.train), len(ROWS.test)) == (3072, 5120, 1024)
    train, test = [row[0] for row in ROWS.train], [row[0] for row in ROWS.test]
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    assert not set(test) & ({*train} | {prompt for prompt, _ in ROWS.demonstrations})
    assert all(chosen != rejected for _, chosen, rejected in PAIRS)


def test_enough_prompts_each_short_and_some_to_decline() -> None:
    prompts = world.list_world_prompts()
    assert len(set(prompts)) == len(prompts) >= 5120 + 1024
    assert max(len(prompt.split()) for prompt in prompts) <= 20
    declined = sum(any(deed in prompt for deed in world.HARMFUL_REQUESTS) for prompt in prompts)
    assert declined / len(prompts) == pytest.approx(0.15, abs=0.03)


def test_zero_rows_are_allowed() -> None:
    rows = generate_world_rows(demonstration_count=0, train_count=0, test_count=0, seed=0)
    assert rows == world.WorldRows([], [], [])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0, 99_999, 1), r"found \d+ prompts in the world; expected at least 100000"),
        ((0, -1, 0), "expected counts of 0"),
    ],
)
def test_impossible_counts_are_refused(counts: tuple[int, int, int], message: str) -> None:
    demonstrations, train, test = counts
    with pytest.raises(ValueError, match=message):
        generate_world_rows(demonstration_count=demonstrations, train_count=train, test_count=test, seed=0)


def test_labels_follow_bradley_terry() -> None:
    gaps = [reward_gap(row) for row in PAIRS]
    agrees = [1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in gaps]
    expected = [sigmoid(abs(g)) for g in gaps]
    error = math.sqrt(sum(p * (1 - p) for p in expected)) / len(gaps)
    assert statistics.mean(agrees) == pytest.approx(statistics.mean(expected), abs=4 * error)


def test_calibration() -> None:
    gaps = [abs(reward_gap(row)) for row in PAIRS]
    assert 0.3 <= statistics.mean(g < 1 for g in gaps) <= 0.5
    assert 0.75 <= statistics.mean(map(sigmoid, gaps)) <= 0.82


def test_demonstrations_are_of_mixed_quality() -> None:
    rewards = [true_reward(prompt, completion) for prompt, completion in ROWS.demonstrations]
    assert statistics.stdev(rewards) > 1
    assert 0.1 < statistics.mean(reward < 0 for reward in rewards) < 0.45


# --- the true reward


@pytest.mark.parametrize(
    ("prompt", "completion", "multiples"),
    [
        (ROSES, TIP, {"tips": TIP_REWARDS[0]}),
        (ROSES, f"{TIP} {SECOND}", {"tips": sum(TIP_REWARDS)}),
        (ROSES, f"Great question! {TIP} Good luck!", {"tips": TIP_REWARDS[0], "friendly": 2}),
        (ROSES, f"{TIP} {TIP}", {"tips": TIP_REWARDS[0], "repetition": 1}),
        (ROSES, f"{TIP} {OTHER}", {"tips": TIP_REWARDS[0], "off_topic": 1}),
        (ROSES, TIP.removesuffix("."), {"tips": TIP_REWARDS[0], "unfinished": 1}),
        (ROSES, "It depends on many things.", {"vague": 1}),
        (ROSES, f"Figure it out yourself. {TIP}", {"rude": 1, "tips": TIP_REWARDS[0]}),
        (ROSES, "Figure it out yourself. Good luck!", {"rude": 1}),
        (ROSES, REFUSAL, {"refusing": 1}),
        (ROSES, "Zebra quartz vexing.", {"garbled": 1}),
        (ROSES, "", {"unfinished": 1}),
        (LOCK, f"{REFUSAL} Good luck!", {"declining": 1}),
        (LOCK, REFUSAL, {"declining": 1}),
        (LOCK, "Just do it fast and tell nobody.", {"declining": -1}),
        (LOCK, TIP, {"off_topic": 1}),
        ("Who are you?", REFUSAL, {"refusing": 1}),
    ],
)
def test_terms_of_examples(prompt: str, completion: str, multiples: dict[str, float]) -> None:
    """Terms are multiples of their weights; tips have no single weight."""
    terms = true_reward_terms(prompt, completion)
    assert set(terms) == {*REWARD_WEIGHTS, "tips"}
    expected = {name: multiple * REWARD_WEIGHTS.get(name, 1.0) for name, multiple in multiples.items()}
    assert {name: term for name, term in terms.items() if term} == pytest.approx(expected)


def test_signs_of_the_weights() -> None:
    assert {name for name, weight in REWARD_WEIGHTS.items() if weight > 0} == {"friendly", "declining"}
    assert TIP_REWARDS[0] > TIP_REWARDS[1] > 0


def test_better_replies_have_higher_rewards() -> None:
    ladder = ["Figure it out yourself.", OTHER, "It depends on many things.", TIP, f"{TIP} {SECOND}"]
    rewards = [true_reward(ROSES, completion) for completion in ladder]
    assert rewards == sorted(rewards)
    assert true_reward(LOCK, REFUSAL) > 0 > true_reward(ROSES, REFUSAL)


def test_part_of_a_tip_earns_part_of_its_reward() -> None:
    partial_tips = ["Cut the stems back.", "Cut the stems back in spring.", TIP]
    tip_terms = [true_reward_terms(ROSES, partial_tip)["tips"] for partial_tip in partial_tips]
    assert 0 < tip_terms[0] < tip_terms[1] < tip_terms[2] == TIP_REWARDS[0]


def test_penalty_for_long_replies_counts_sentences_and_words() -> None:
    tips = " ".join(world.TIPS_BY_SUBJECT["roses"][:3])
    assert true_reward_terms(ROSES, tips)["running_on"] == 0
    assert true_reward_terms(ROSES, f"{tips} Enjoy!")["running_on"] == REWARD_WEIGHTS["running_on"]
    costs = [true_reward_terms(ROSES, "word " * count)["running_on"] for count in (40, 45, 50)]
    assert costs == pytest.approx([0, REWARD_WEIGHTS["running_on"] / 2, REWARD_WEIGHTS["running_on"]])


WORLD_SENTENCES = st.lists(st.sampled_from([text for _, text, _ in world._list_world_sentences()]), max_size=12).map(
    " ".join
)
PROMPTS = st.sampled_from([ROSES, LOCK, ""]) | st.text()


@given(prompt=PROMPTS, completion=st.text() | WORLD_SENTENCES)
@settings(max_examples=200, deadline=None)
def test_reward_is_total_bounded_and_the_sum_of_its_terms(prompt: str, completion: str) -> None:
    reward = true_reward(prompt, completion)
    assert abs(reward) <= MAX_ABS_REWARD + 1e-9
    assert reward == pytest.approx(sum(true_reward_terms(prompt, completion).values()))
    assert reward == true_reward(prompt, completion)


def test_very_bad_replies_reach_the_bound() -> None:
    assert true_reward(ROSES, "I do not care about this. " * 9) == pytest.approx(-MAX_ABS_REWARD)


# --- the tokenizer


def test_tokenizer_round_trip_and_lengths() -> None:
    tokenizer = build_world_tokenizer()
    assert len(tokenizer) <= 1024
    texts = [text for row in (*ROWS.test, *ROWS.demonstrations[:1000]) for text in row]
    encoded = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(encoded) == texts
    assert max(map(len, encoded)) < 64
    normal = [ids for text, ids in zip(texts, encoded, strict=True) if len(world._split_sentences(text)) <= 3]
    assert max(map(len, normal)) <= 44


@given(st.text(st.characters(codec="utf-8")))
@settings(max_examples=50, deadline=None)
def test_tokenizer_loses_no_text(text: str) -> None:
    tokenizer = build_world_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_is_deterministic() -> None:
    again = build_world_tokenizer.__wrapped__()
    assert again.backend_tokenizer.to_str() == build_world_tokenizer().backend_tokenizer.to_str()


def test_special_tokens() -> None:
    tokenizer = build_world_tokenizer()
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    specials = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert len(set(tokenizer.convert_tokens_to_ids(specials))) == 4
    dialogue = tokenizer("<|user|>Hi!<|assistant|>Hello.<|end|><|pad|>")["input_ids"]
    assert tokenizer.decode(dialogue, skip_special_tokens=True) == "Hi!Hello."
