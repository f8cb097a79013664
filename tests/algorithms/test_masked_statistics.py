import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixpo.algorithms.masked import masked_mean, whiten


def example(seed=0, shape=(3, 5)):
    generator = torch.Generator().manual_seed(seed)
    x = 3.0 + 2.0 * torch.randn(shape, dtype=torch.float64, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0, :2] = True
    return x, mask


def true_values(x, mask):
    return [
        v for row, flags in zip(x.tolist(), mask.tolist(), strict=True) for v, f in zip(row, flags, strict=True) if f
    ]


def assert_close(x, expected):
    torch.testing.assert_close(x, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_masked_mean_is_the_mean_of_the_true_entries():
    x, mask = example()
    values = true_values(x, mask)
    assert_close(masked_mean(x, mask), sum(values) / len(values))


def test_a_mask_that_is_true_nowhere_is_refused():
    with pytest.raises(ValueError, match="true somewhere"):
        masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="true somewhere"):
        whiten(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 1e3), shift=st.floats(-1e3, 1e3))
def test_whitened_values_have_mean_0_and_variance_1(seed, scale, shift):
    x, mask = example(seed)
    whitened = whiten(x * scale + shift, mask)
    values = true_values(whitened, mask)
    mean = sum(values) / len(values)
    assert abs(mean) < 1e-9
    assert abs(sum((v - mean) ** 2 for v in values) / len(values) - 1.0) < 1e-9
    assert (whitened[~mask] == 0.0).all()


def test_whiten_is_the_formula_entry_by_entry():
    x, mask = example()
    values = true_values(x, mask)
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    expected = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            if mask[row, column]:
                expected[row, column] = (float(x[row, column]) - mean) / deviation
    assert_close(whiten(x, mask), expected)


@pytest.mark.parametrize("garbage", [1e6, -1e6, 1e30])
def test_values_outside_the_mask_change_nothing(garbage):
    x, mask = example()
    padded = torch.cat([x, torch.full((3, 2), garbage, dtype=torch.float64)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    inside = x.masked_fill(~mask, garbage)
    assert torch.equal(masked_mean(padded, padded_mask), masked_mean(x, mask))
    assert torch.equal(whiten(padded, padded_mask)[:, :5], whiten(x, mask))
    assert torch.equal(whiten(inside, mask), whiten(x, mask))
    assert (whiten(padded, padded_mask)[:, 5:] == 0.0).all()


def test_a_variance_below_the_floor_is_raised_to_it():
    x = torch.tensor([[-1e-5, 1e-5]], dtype=torch.float64)
    assert_close(whiten(x, torch.ones(1, 2, dtype=torch.bool)), [[-0.1, 0.1]])
