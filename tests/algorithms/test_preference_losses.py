import math
import runpy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixpo.algorithms import preference
from mixpo.algorithms.preference import (
    bradley_terry_loss,
    centering_loss,
    dpo_gradients,
    dpo_loss,
    fit_bradley_terry,
    implicit_rewards,
)

finite = st.floats(-50.0, 50.0)
quick = settings(deadline=None, derandomize=True, max_examples=50)


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def assert_close(x, expected, atol=1e-12):
    torch.testing.assert_close(x, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=atol)


def test_bradley_terry_is_the_probability_of_the_choice():
    chosen, rejected = [2.0, -1.0, 0.5, 0.0], [0.5, 1.0, 0.5, 7.0]
    expected = []
    for c, r in zip(chosen, rejected, strict=True):
        expected.append(-math.log(math.exp(c) / (math.exp(c) + math.exp(r))))
    assert_close(bradley_terry_loss(tensor(*chosen), tensor(*rejected)), expected)


def test_fitted_weights_have_zero_gradient_at_any_column_scale():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x + torch.tensor([0.5, -0.3, 0.0, 0.1, 0.0])) * torch.tensor([1.0, 10.0, 0.01, 1.0, 0.0])
    weights = fit_bradley_terry(x, ridge=0.05).requires_grad_()
    scale = x.std(dim=0, correction=0)
    loss = bradley_terry_loss(x @ weights, torch.zeros(200, dtype=torch.float64)).mean()
    loss = loss + 0.05 / 2 * (scale * weights).square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert_close(gradient[:4] / scale[:4], torch.zeros(4), atol=1e-7)
    assert weights[4] == 0
    assert weights[0] > 0 > weights[1]
    scaled = fit_bradley_terry(x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), ridge=0.05)
    assert_close(scaled[:4] * torch.tensor([1.0, 2.0, 3.0, 4.0]), weights[:4].detach(), atol=1e-5)


def test_fit_of_one_feature_by_hand():
    """Three of four differences are +1: without a penalty the weight is log 3; a ridge draws it to 0."""
    x = torch.tensor([[1.0], [1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert_close(fit_bradley_terry(x, ridge=1e-9), [math.log(3)], atol=1e-6)
    assert 0 < fit_bradley_terry(x, ridge=1.0) < 0.5
    with pytest.raises(ValueError, match="expected a ridge above 0, found 0"):
        fit_bradley_terry(x, ridge=0.0)


def test_bradley_terry_is_finite_for_extreme_scores():
    assert_close(bradley_terry_loss(tensor(0.0, 1e6), tensor(1e6, 0.0)), [1e6, 0.0])


@quick
@given(finite, finite, st.floats(-100.0, 100.0))
def test_bradley_terry_ignores_a_shift_of_both_scores(chosen, rejected, shift):
    plain = bradley_terry_loss(tensor(chosen), tensor(rejected))
    assert_close(bradley_terry_loss(tensor(chosen + shift), tensor(rejected + shift)), plain, atol=1e-11)


def test_centering_loss_depends_on_the_mean_score_only():
    assert_close(centering_loss(tensor(2.0, 3.0, 1.0), tensor(-2.0, 1.0, -5.0)), [0.0, 16.0, 16.0])


def test_implicit_rewards_hand_values():
    assert_close(implicit_rewards(tensor(-10.0, -3.0), tensor(-12.0, -1.0), beta=0.5), [1.0, -1.0])


def test_dpo_is_the_formula_pair_by_pair():
    generator = torch.Generator().manual_seed(0)
    four = [-10.0 * torch.rand(6, dtype=torch.float64, generator=generator) for _ in range(4)]
    expected = []
    for w, l, ref_w, ref_l in zip(*(x.tolist() for x in four), strict=True):  # noqa: E741
        weight_w = (math.exp(w) / math.exp(ref_w)) ** 0.3
        weight_l = (math.exp(l) / math.exp(ref_l)) ** 0.3
        expected.append(-math.log(weight_w / (weight_w + weight_l)))
    assert_close(dpo_loss(*four, beta=0.3), expected)


@quick
@given(finite, finite, st.floats(0.01, 5.0))
def test_dpo_is_log_2_where_the_policy_equals_the_reference(chosen, rejected, beta):
    c, r = tensor(chosen), tensor(rejected)
    assert_close(dpo_loss(c, r, c, r, beta=beta), [math.log(2.0)])


@quick
@given(finite, finite, finite, finite, st.floats(-100.0, 100.0))
def test_dpo_ignores_shifts_that_cancel(w, l, ref_w, ref_l, shift):  # noqa: E741
    plain = dpo_loss(tensor(w), tensor(l), tensor(ref_w), tensor(ref_l), beta=0.1)
    both_of_the_policy = dpo_loss(tensor(w + shift), tensor(l + shift), tensor(ref_w), tensor(ref_l), beta=0.1)
    both_of_the_chosen = dpo_loss(tensor(w + shift), tensor(l), tensor(ref_w + shift), tensor(ref_l), beta=0.1)
    assert_close(both_of_the_policy, plain, atol=1e-11)
    assert_close(both_of_the_chosen, plain, atol=1e-11)


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(1)
    four = [torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(bradley_terry_loss, four[:2])
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.7), four)


BROADCASTS = [
    pytest.param("bradley_terry_loss", (2, 1), {}, id="bradley-terry"),
    pytest.param("implicit_rewards", (2, 1), {"beta": 0.1}, id="implicit rewards"),
    pytest.param("dpo_loss", (2, 1, 1, 1), {"beta": 0.1}, id="dpo: rejected and reference"),
    pytest.param("dpo_loss", (2, 2, 1, 1), {"beta": 0.1}, id="dpo: reference"),
    pytest.param("dpo_loss", (2, 2, 2, 1), {"beta": 0.1}, id="dpo: reference of the rejected"),
    pytest.param("dpo_loss", (2, 1, 2, 1), {"beta": 0.1}, id="dpo: both of the rejected"),
]


@pytest.mark.parametrize(("name", "shapes", "options"), BROADCASTS)
def test_shapes_that_would_broadcast_are_refused_without_a_type_checker(name, shapes, options):
    unchecked = runpy.run_path(preference.__file__)
    with pytest.raises(ValueError, match=r"expected equal shapes, found \[2\] and \[1\]"):
        unchecked[name](*(torch.zeros(n) for n in shapes), **options)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_theorem_1_and_its_corollary(beta):
    """Feng et al. 2024, in closed form: written from the paper, not by automatic differentiation."""
    generator = torch.Generator().manual_seed(2)
    for log_w, log_l in 3.0 * torch.randn(50, 2, generator=generator, dtype=torch.float64):
        by_w, by_l = dpo_gradients(log_w, log_l, beta=beta)
        w, l = math.exp(log_w), math.exp(log_l)  # noqa: E741
        total = w**beta + l**beta
        assert by_w == pytest.approx(-beta * l**beta / (w * total), rel=1e-9)
        assert by_l == pytest.approx(beta * l ** (beta - 1) / total, rel=1e-9)
        assert abs(by_w / by_l) == pytest.approx(l / w, rel=1e-9)
