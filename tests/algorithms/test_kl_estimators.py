import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixpo.algorithms.kl import (
    adapt_kl_coef,
    compute_sft_anchor_weight,
    kl_bound_of_best_of_n,
    kl_k1,
    kl_k3,
    update_kl_budget_controller,
)

logprob = st.floats(-30.0, 0.0)
quick = settings(deadline=None, derandomize=True, max_examples=100)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_hand_values():
    policy, reference = [math.log(0.5), math.log(0.1)], [math.log(0.25), math.log(0.4)]
    expected_k1 = [math.log(2.0), -math.log(4.0)]
    expected_k3 = [0.5 - 1.0 + math.log(2.0), 4.0 - 1.0 - math.log(4.0)]
    torch.testing.assert_close(kl_k1(tensor(*policy), tensor(*reference)), tensor(*expected_k1), rtol=0, atol=1e-12)
    torch.testing.assert_close(kl_k3(tensor(*policy), tensor(*reference)), tensor(*expected_k3), rtol=0, atol=1e-12)


@quick
@given(logprob, logprob)
def test_k3_is_never_negative(policy, reference):
    assert kl_k3(tensor(policy), tensor(reference)) >= 0.0


def test_k3_is_precise_for_nearly_equal_policies():
    """With e = log pi_ref - log pi small, e^e - 1 - e = e^2 / 2 + ...; exp(e) - 1 would lose it in rounding."""
    near = kl_k3(tensor(0.0), tensor(-1e-6))
    torch.testing.assert_close(near, tensor(0.5e-12 - 1e-18 / 6), rtol=1e-8, atol=0)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_means_over_draws_of_the_policy_agree_with_the_exact_kl(estimator):
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(7, dtype=torch.float64, generator=generator).log_softmax(0)
    reference = torch.randn(7, dtype=torch.float64, generator=generator).log_softmax(0)
    exact = sum(math.exp(p) * (p - q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    draws = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    estimates = estimator(policy[draws], reference[draws])
    standard_error = float(estimates.std()) / len(draws) ** 0.5
    assert standard_error < exact / 50
    assert abs(float(estimates.mean()) - exact) < 5 * standard_error


@pytest.mark.parametrize(
    ("kl", "rate", "expected"),
    [
        pytest.param(6.0, {}, 0.2, id="at the target"),
        pytest.param(6.6, {}, 0.2 * 1.01, id="a little above"),
        pytest.param(5.4, {}, 0.2 * 0.99, id="a little below"),
        pytest.param(7.2, {}, 0.2 * 1.02, id="at the upper clip"),
        pytest.param(600.0, {}, 0.2 * 1.02, id="far above"),
        pytest.param(0.0, {}, 0.2 * 0.98, id="far below"),
        pytest.param(-5.0, {}, 0.2 * 0.98, id="negative estimate"),
        pytest.param(12.0, {"rate": 0.5}, 0.2 * 1.1, id="another rate"),
    ],
)
def test_adapt_kl_coef(kl, rate, expected):
    assert adapt_kl_coef(0.2, kl, target_kl=6.0, **rate) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_kl_of_best_of_n_by_integration(n):
    """Of continuous scores: the best of n has the density n x^(n-1) over the scores' quantiles x."""
    x = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    density = n * x ** (n - 1)
    assert kl_bound_of_best_of_n(n) == pytest.approx(float((density * density.log()).mean()), abs=1e-5)


@quick
@given(st.floats(0.05, 20.0), st.floats(0.01, 1.0), logprob, logprob, logprob)
def test_anchor_between_reference_and_sft_equals_two_kl_penalties(multiplier, kl_coef, policy, reference, sft):
    weight = compute_sft_anchor_weight(multiplier)
    anchored = kl_coef * multiplier * (policy - ((1 - weight) * reference + weight * sft))
    loosened, pulled = kl_coef * min(1.0, multiplier), kl_coef * max(0.0, multiplier - 1.0)
    assert anchored == pytest.approx(loosened * (policy - reference) + pulled * (policy - sft), abs=1e-9)


def simulate_kl_controller(budget, start, needed, steps=200):
    """A made-up policy whose KL follows, with a lag, a law in which a larger multiplier means less of it."""
    kl, total, multiplier, seen = start, 0.0, 1.0, []
    for _ in range(steps):
        kl += 0.3 * (budget * (needed / multiplier) ** 0.5 - kl)
        multiplier, total = update_kl_budget_controller(total, kl, budget=budget)
        seen.append(kl)
    return seen, multiplier


@pytest.mark.parametrize("needed", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("start", [0.0, 1.0, 9.0])
def test_controller_reaches_the_budget_from_any_start(start, needed):
    seen, multiplier = simulate_kl_controller(2.0, start, needed)
    assert seen[-1] == pytest.approx(2.0, rel=0.01)
    assert multiplier == pytest.approx(needed, rel=0.05)


def test_errors_clipped_from_below_count_a_tenth():
    assert update_kl_budget_controller(0.0, 0.0, budget=2.0) == (pytest.approx(math.exp(-1.525)), pytest.approx(-0.05))
    assert update_kl_budget_controller(0.0, -0.1, budget=2.0)[1] == pytest.approx(-0.05)
    assert update_kl_budget_controller(0.0, 1.9, budget=2.0)[1] == pytest.approx(math.log(0.95))
    assert update_kl_budget_controller(0.5, 2.0, budget=2.0) == (pytest.approx(math.exp(0.25)), 0.5)
    assert update_kl_budget_controller(0.0, 200.0, budget=2.0) == (pytest.approx(math.exp(1.75)), 0.5)
