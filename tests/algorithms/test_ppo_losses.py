import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixpo.algorithms.ppo import (
    clip_fraction,
    explained_variance,
    generalized_advantages,
    grpo_advantages,
    policy_loss,
    rloo_advantages,
    shaped_rewards,
    truncated_importance_weights,
    value_loss,
)

quick = settings(deadline=None, derandomize=True, max_examples=50)
LENGTHS = [5, 1, 3]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensor(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


def make_mask(lengths, width=5):
    return torch.tensor([[place < length for place in range(width)] for length in lengths])


def pad(x, value):
    """Two more places at the right, filled with garbage or with false."""
    return torch.cat([x, torch.full((x.shape[0], 2), value, dtype=x.dtype)], dim=1)


def assert_close(x, expected):
    torch.testing.assert_close(x, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# Rewards


def rewards_by_loop(logprobs, reference, lengths, scores, kl_coef, score_clip):
    rewards = np.zeros(logprobs.shape)
    for row, length in enumerate(lengths):
        for token in range(length):
            rewards[row, token] = kl_coef * (float(reference[row, token]) - float(logprobs[row, token]))
        score = float(scores[row])
        if score_clip is not None:
            score = max(-score_clip, min(score_clip, score))
        rewards[row, length - 1] += score
    return rewards


@pytest.mark.parametrize("score_clip", [None, 0.5, 100.0])
def test_shaped_rewards_are_the_formula_token_by_token(score_clip):
    logprobs, reference, scores = random(3, 5), random(3, 5, seed=1), tensor([2.0, -3.0, 0.25])
    rewards = shaped_rewards(logprobs, reference, make_mask(LENGTHS), scores, kl_coef=0.3, score_clip=score_clip)
    assert_close(rewards, rewards_by_loop(logprobs, reference, LENGTHS, scores, 0.3, score_clip))


def test_penalties_are_subtracted_from_the_clipped_score():
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    options = {"kl_coef": 0.1, "score_clip": 5.0, "penalties": tensor([0.0, 3.0])}
    rewards = shaped_rewards(zeros, zeros, make_mask([5, 2]), tensor([8.0, 8.0]), **options)
    assert_close(rewards, [[0, 0, 0, 0, 5], [0, 2, 0, 0, 0]])


@pytest.mark.parametrize("garbage", [1e6, -1e6, 1e30])
def test_padding_does_not_change_shaped_rewards(garbage):
    logprobs, reference, scores, mask = random(3, 5), random(3, 5, seed=1), random(3, seed=2), make_mask(LENGTHS)
    plain = shaped_rewards(logprobs, reference, mask, scores, kl_coef=0.2, score_clip=1.0)
    padded_inputs = pad(logprobs, garbage), pad(reference, 7.0), pad(mask, False)
    padded = shaped_rewards(*padded_inputs, scores, kl_coef=0.2, score_clip=1.0)
    assert torch.equal(padded[:, :5], plain)
    assert (padded[:, 5:] == 0.0).all()
    assert (plain[~mask] == 0.0).all()


@pytest.mark.parametrize(
    "row",
    [
        pytest.param([False] * 5, id="empty"),
        pytest.param([True, False, True, False, False], id="hole"),
        pytest.param([False, True, True, True, True], id="late start"),
    ],
)
def test_empty_masks_and_masks_with_gaps_are_refused(row):
    mask = torch.tensor([[True] * 5, row])
    with pytest.raises(ValueError, match="true from the first token to the last one"):
        shaped_rewards(random(2, 5), random(2, 5), mask, random(2), kl_coef=0.1, score_clip=None)


# Advantages


def advantages_by_loop(rewards, values, lengths, discount, gae_lambda):
    advantages = np.zeros(rewards.shape)
    for row, length in enumerate(lengths):
        delta = []
        for t in range(length):
            following = float(values[row, t + 1]) if t + 1 < length else 0.0
            delta.append(float(rewards[row, t]) + discount * following - float(values[row, t]))
        for t in range(length):
            advantages[row, t] = sum((discount * gae_lambda) ** (s - t) * delta[s] for s in range(t, length))
    return advantages


@quick
@given(
    st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 99)
)
def test_gae_is_the_sum_of_equation_16(discount, gae_lambda, lengths, seed):
    rewards, values = random(len(lengths), 5, seed=seed), random(len(lengths), 5, seed=seed + 100)
    ours = generalized_advantages(rewards, values, make_mask(lengths), discount=discount, gae_lambda=gae_lambda)
    assert_close(ours, advantages_by_loop(rewards, values, lengths, discount, gae_lambda))


def test_gae_with_lambda_1_and_discount_1_is_return_to_go_minus_value():
    rewards, values = random(3, 5), random(3, 5, seed=1)
    ours = generalized_advantages(rewards, values, make_mask(LENGTHS), discount=1.0, gae_lambda=1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            assert_close(ours[row, t], sum(rewards[row, t:length].tolist()) - float(values[row, t]))


@pytest.mark.parametrize("garbage", [1e6, -1e6, 1e30])
def test_padding_does_not_change_gae(garbage):
    rewards, values, mask = random(3, 5), random(3, 5, seed=1), make_mask(LENGTHS)
    inputs = [
        (rewards, values, mask),
        (pad(rewards, garbage), pad(values, garbage), pad(mask, False)),
        (rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage), mask),
    ]
    plain, padded, dirty = (generalized_advantages(*each, discount=0.99, gae_lambda=0.95) for each in inputs)
    assert torch.equal(padded[:, :5], plain)
    assert torch.equal(dirty, plain)
    assert (padded[:, 5:] == 0.0).all()
    assert (plain[~mask] == 0.0).all()


@quick
@given(st.integers(2, 6), st.integers(0, 99))
def test_rloo_leaves_one_out(k, seed):
    rewards = random(3, k, seed=seed)
    expected = np.zeros((3, k))
    for prompt in range(3):
        for i in range(k):
            others = [float(rewards[prompt, j]) for j in range(k) if j != i]
            expected[prompt, i] = float(rewards[prompt, i]) - sum(others) / (k - 1)
    ours = rloo_advantages(rewards)
    assert_close(ours, expected)
    assert_close(ours.sum(dim=1), np.zeros(3))


@quick
@given(st.integers(2, 6), st.integers(0, 99))
def test_grpo_scales_by_the_sample_deviation_of_the_group(k, seed):
    rewards = random(3, k, seed=seed)
    ours = grpo_advantages(rewards)
    for prompt in range(3):
        group = rewards[prompt].numpy()
        for i in range(k):
            assert_close(ours[prompt, i], (group[i] - np.mean(group)) / (np.std(group, ddof=1) + 1e-4))
    assert_close(ours.sum(dim=1), np.zeros(3))


def test_equal_rewards_have_no_advantage():
    equal = torch.full((2, 3), 0.5, dtype=torch.float64)
    assert (rloo_advantages(equal) == 0.0).all()
    assert (grpo_advantages(equal) == 0.0).all()


@pytest.mark.parametrize("compute_advantages", [rloo_advantages, grpo_advantages])
@pytest.mark.parametrize("k", [0, 1])
def test_one_completion_per_prompt_is_refused(compute_advantages, k):
    with pytest.raises(ValueError, match=f"at least 2 completions to compare, found {k}"):
        compute_advantages(torch.zeros(3, k))


# Policy loss


def test_policy_loss_is_the_formula_token_by_token():
    logprobs, old, advantages = 0.3 * random(3, 5), 0.3 * random(3, 5, seed=1), random(3, 5, seed=2)
    expected = np.zeros((3, 5))
    for row in range(3):
        for t in range(5):
            ratio, a = math.exp(logprobs[row, t]) / math.exp(old[row, t]), float(advantages[row, t])
            expected[row, t] = max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
    assert_close(policy_loss(logprobs, old, advantages, clip=0.2), expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        pytest.param(1.5, 2.0, -2.4, 0.0, id="too high, good: stopped"),
        pytest.param(1.5, -2.0, 3.0, 3.0, id="too high, bad: goes down"),
        pytest.param(0.5, 2.0, -1.0, -1.0, id="too low, good: goes up"),
        pytest.param(0.5, -2.0, 1.6, 0.0, id="too low, bad: stopped"),
        pytest.param(1.1, 2.0, -2.2, -2.2, id="inside, good"),
        pytest.param(0.9, -2.0, 1.8, 1.8, id="inside, bad"),
    ],
)
def test_policy_clip_stops_the_gradient(ratio, advantage, loss, gradient):
    logprobs = tensor([[math.log(ratio)]], requires_grad=True)
    losses = policy_loss(logprobs, tensor([[0.0]]), tensor([[advantage]]), clip=0.2)
    losses.sum().backward()
    assert_close(losses.detach(), [[loss]])
    assert_close(logprobs.grad, [[gradient]])


@quick
@given(st.integers(0, 999), st.floats(0.05, 0.5))
def test_clip_fraction_is_the_share_of_true_tokens_without_gradient(seed, clip):
    logprobs, old = 0.4 * random(3, 5, seed=seed), 0.4 * random(3, 5, seed=seed + 1000)
    advantages, mask = random(3, 5, seed=seed + 2000), make_mask(LENGTHS)
    logprobs.requires_grad_()
    policy_loss(logprobs, old, advantages, clip=clip).sum().backward()
    stopped = [float(logprobs.grad[row, t]) == 0.0 for row, length in enumerate(LENGTHS) for t in range(length)]
    assert_close(clip_fraction(logprobs.detach(), old, advantages, mask, clip=clip), sum(stopped) / len(stopped))


@quick
@given(st.integers(0, 999), st.floats(1.0, 3.0))
def test_importance_weights_are_the_ratio_up_to_the_clip(seed, clip):
    logprobs, sampler = random(3, 5, seed=seed) - 3.0, random(3, 5, seed=seed + 1000) - 3.0
    expected = np.minimum(np.exp(logprobs.numpy()) / np.exp(sampler.numpy()), clip)
    assert_close(truncated_importance_weights(logprobs, sampler, clip=clip), expected)
    assert_close(truncated_importance_weights(logprobs, logprobs, clip=clip), np.ones((3, 5)))


def test_padding_changes_neither_the_summed_loss_nor_its_gradient_nor_the_clip_fraction():
    old, advantages, mask = random(3, 5, seed=1), random(3, 5, seed=2), make_mask(LENGTHS)
    logprobs = random(3, 5)
    results = []
    for garbage in (0.0, 300.0):
        x = pad(logprobs.masked_fill(~mask, garbage), garbage).requires_grad_()
        rest = pad(old.masked_fill(~mask, 0.0), 0.0), pad(advantages.masked_fill(~mask, 0.0), 0.0)
        full = pad(mask, False)
        summed = policy_loss(x, *rest, clip=0.2)[full].sum()
        summed.backward()
        results.append((summed.detach(), x.grad, clip_fraction(x.detach(), *rest, full, clip=0.2)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


# Values


def test_value_loss_is_the_formula_token_by_token():
    values, old, returns = random(3, 5), random(3, 5, seed=1), random(3, 5, seed=2)
    unclipped, clipped = np.zeros((3, 5)), np.zeros((3, 5))
    for row in range(3):
        for t in range(5):
            v, o, r = float(values[row, t]), float(old[row, t]), float(returns[row, t])
            near_old = min(max(v, o - 0.4), o + 0.4)
            unclipped[row, t] = 0.5 * (v - r) ** 2
            clipped[row, t] = 0.5 * max((v - r) ** 2, (near_old - r) ** 2)
    assert_close(value_loss(values, old, returns, clip=None), unclipped)
    assert_close(value_loss(values, old, returns, clip=0.4), clipped)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        pytest.param(0.1, 1.0, 0.405, -0.9, id="inside"),
        pytest.param(0.5, 1.0, 0.32, 0.0, id="already far towards the return: stopped"),
        pytest.param(-0.5, 1.0, 1.125, -1.5, id="far the wrong way: pulled back"),
        pytest.param(-0.5, -1.0, 0.32, 0.0, id="far down towards the return: stopped"),
    ],
)
def test_value_clip_stops_the_gradient(value, target, loss, gradient):
    values = tensor([[value]], requires_grad=True)
    losses = value_loss(values, tensor([[0.0]]), tensor([[target]]), clip=0.2)
    losses.sum().backward()
    assert_close(losses.detach(), [[loss]])
    assert_close(values.grad, [[gradient]])


def test_explained_variance_over_the_mask():
    returns, mask = random(3, 5), make_mask(LENGTHS)
    values = returns + 0.5 * random(3, 5, seed=1)
    truth = [float(returns[row, t]) for row, n in enumerate(LENGTHS) for t in range(n)]
    error = [float(returns[row, t] - values[row, t]) for row, n in enumerate(LENGTHS) for t in range(n)]
    expected = 1.0 - np.var(error) / np.var(truth)
    assert_close(explained_variance(values, returns, mask), expected)
    assert_close(explained_variance(values.masked_fill(~mask, 1e6), returns.masked_fill(~mask, -1e6), mask), expected)


def test_explained_variance_of_perfect_and_constant_values():
    returns, mask = random(3, 5), make_mask(LENGTHS)
    assert_close(explained_variance(returns + 4.0, returns, mask), 1.0)
    assert_close(explained_variance(torch.full_like(returns, 3.0), returns, mask), 0.0)
    assert explained_variance(random(3, 5), torch.full_like(returns, 0.5), mask) == 0.0
