"""How tokens are drawn: from the model's distribution, with noise that nothing but seed, prompt, branch and position
decides. The noise is made of integers, so the figures here are the same on every processor.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mixpo.models import sampling
from mixpo.models.loading import ModelLoader
from mixpo.models.sampling import (
    BLOCK_TOKENS,
    count_cacheable_tokens,
    count_noise_values,
    draw_tokens,
    make_exponential_noise,
    make_noise_keys,
    sample_completions,
)
from mixpo.models.sources import initialize_world_model
from models import ARCHITECTURES, tiny

PROMPTS = [[3, 9, 4, 11, 7, 8, 9, 10], [12, 13], [20, 21, 22, 23, 24]]
DRAWS = 40_000


def keys(count: int, *, prompt: list[int] | None = None, seed: int = 0, branch: int = 0, occurrence: int = 0) -> Tensor:
    """Those of the first positions of a completion."""
    return make_noise_keys(prompt or [7], seed=seed, occurrence=occurrence, k=branch + 1, max_tokens=count)[branch]


def draw(probabilities: Tensor, keys: Tensor) -> Tensor:
    """A token a key, all from one distribution, in portions."""
    count = count_noise_values(len(probabilities))
    noises = (make_exponential_noise(portion, count) for portion in keys.split(500))
    return torch.cat([draw_tokens(probabilities.expand(len(noise), -1), noise) for noise in noises])


def peaked(vocabulary: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.softmax(torch.randn(vocabulary, generator=generator) * scale, dim=-1)


def agrees(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether the chi-square test of counts passes, with events of fewer than 5 draws taken together."""
    expected = probabilities.astype(np.float64) / probabilities.sum() * counts.sum()
    rare = expected < 5
    actual, reference = [*counts[~rare]], [*expected[~rare]]
    if expected[rare].sum() > 5:
        actual, reference = [*actual, counts[rare].sum()], [*reference, expected[rare].sum()]
    statistic = sum((one - other) ** 2 / other for one, other in zip(actual, reference, strict=True))
    return bool(1e-4 < stats.chi2.sf(statistic, len(actual) - 1) < 1 - 1e-4)


# --- the noise


def test_noise_is_minus_the_logarithm_of_splitmix64() -> None:
    """With Python's integers, which do not wrap around."""

    def signed(word: int) -> int:
        return (word + 2**63) % 2**64 - 2**63

    def expected(key: int, place: int) -> float:
        x = signed(key + place * 0x9E3779B97F4A7C15)
        x = signed((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9)
        x = signed((x ^ (x >> 27)) * 0x94D049BB133111EB)
        return -math.log((x // 2**12 + 2**51 + 0.5) / 2**52)

    key_values = [0, -1, 2**63 - 1, -(2**63), 123456789]
    actual = make_exponential_noise(torch.tensor(key_values), 50)
    assert actual.dtype == torch.float32
    reference = [[expected(key, place) for place in range(1, 51)] for key in key_values]
    torch.testing.assert_close(actual, torch.tensor(reference), rtol=1e-6, atol=0.0)


def test_keys_are_told_apart_by_all_that_the_noise_depends_on_and_by_nothing_else() -> None:
    one = keys(20)
    assert torch.equal(keys(10), one[:10]), "how many tokens may come changes none of them"
    assert torch.equal(make_noise_keys([7], seed=0, occurrence=0, k=3, max_tokens=20)[0], one), "nor do other branches"
    changes: list[dict[str, Any]] = [{name: 1} for name in ("seed", "branch", "occurrence")]
    changes += [{"prompt": [7, 0]}, {"prompt": [0, 7]}, {"seed": -1}, {"seed": 2**70}]
    assert len({*one.tolist()}.union(*(keys(20, **change).tolist() for change in changes))) == 20 * 8
    digest = hashlib.shake_128(b"0 0 0 7").digest(8 * 20)
    assert one.tolist() == [int.from_bytes(digest[at : at + 8], "little", signed=True) for at in range(0, 160, 8)]


BRANCH_KEYS = make_noise_keys([7], seed=0, occurrence=0, k=20_000, max_tokens=1)
STREAMS: dict[str, Callable[[], Tensor]] = {
    "tokens": lambda: make_exponential_noise(keys(1), 100_000),
    "positions": lambda: make_exponential_noise(keys(100_000), 1),
    "seeds": lambda: make_exponential_noise(torch.cat([keys(1, seed=seed) for seed in range(20_000)]), 1),
    "branches": lambda: make_exponential_noise(BRANCH_KEYS[:, 0], 1),
    "prompts": lambda: make_exponential_noise(torch.cat([keys(1, prompt=[x, 5]) for x in range(20_000)]), 1),
    "adjacent keys": lambda: make_exponential_noise(torch.arange(100_000), 1),
}


@pytest.mark.parametrize("along", STREAMS)
def test_noise_is_exponential_and_independent(along: str) -> None:
    noise = STREAMS[along]().flatten().double().numpy()
    uniform = np.exp(-noise)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    rare = noise[noise < 1e-2] * 100
    assert stats.kstest(-np.expm1(-rare / 100) / -math.expm1(-1e-2), "uniform").pvalue > 1e-3, "small numbers decide"
    for lag in (1, 2, 64):
        correlation = np.corrcoef(uniform[lag:], uniform[:-lag])[0, 1]
        assert abs(correlation) * len(uniform) ** 0.5 < 4
        pairs = np.histogram2d(uniform[lag:], uniform[:-lag], bins=16)[0].flatten()
        assert agrees(pairs, np.ones(256))


# --- the draws


@pytest.mark.parametrize(
    ("vocabulary", "scale"),
    [(2, 1.0), (7, 3.0), (BLOCK_TOKENS, 2.0), (BLOCK_TOKENS + 1, 4.0), (1000, 3.0), (5000, 1.0)],
)
def test_draws_follow_the_probabilities(vocabulary: int, scale: float) -> None:
    draws = min(DRAWS, 40_000_000 // vocabulary)
    probabilities = peaked(vocabulary, scale)
    for factor in (1, 10):
        tokens = draw(factor * probabilities, keys(draws, seed=factor))
        counts = torch.bincount(tokens, minlength=vocabulary)
        assert len(counts) == vocabulary
        assert agrees(counts.numpy(), probabilities.numpy())


def test_draws_of_a_large_vocabulary_follow_the_probabilities() -> None:
    """In 100 groups of tokens, and those of 1e-4 and less among each other."""
    probabilities = peaked(49_152, 3.0)
    tokens = draw(probabilities, keys(4000)).numpy()
    order = probabilities.argsort(descending=True).numpy()
    cumulative = probabilities.double().numpy()[order].cumsum()
    group = np.empty(49_152, dtype=int)
    group[order] = np.minimum(cumulative * 100, 99).astype(int)
    assert agrees(np.bincount(group[tokens], minlength=100), np.bincount(group, probabilities.double().numpy(), 100))
    rare = probabilities.numpy() < 1e-4
    places = np.cumsum(rare) * 20 // (rare.sum() + 1)
    actual, reference = tokens[rare[tokens]], np.where(rare, probabilities.double().numpy(), 0.0)
    assert len(actual) > 500
    assert agrees(np.bincount(places[actual], minlength=20), np.bincount(places, reference, 20))


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """Of a thousandth each, beside one that takes the rest; and never the impossible ones between them."""
    probabilities = torch.zeros(300)
    probabilities[[3, 100, 101, 299]] = torch.tensor([1e-3, 1e-3, 0.997, 1e-3])
    counts = torch.bincount(draw(probabilities, keys(200_000)), minlength=300)
    assert int(counts.count_nonzero()) == 4
    for token in (3, 100, 299):
        assert abs(int(counts[token]) - 200) < 4 * 200**0.5


@pytest.mark.parametrize("along", ["seed", "branch", "occurrence", "prompt", "position"])
def test_draws_are_independent(along: str) -> None:
    """Two that differ in one thing are the same token as often as chance has it, the sum of p^2."""
    probabilities = peaked(200, 2.0)
    if along == "position":
        tokens = draw(probabilities, keys(DRAWS + 1))
        one, other = tokens[1:], tokens[:-1]
    else:
        differs = {"prompt": {"prompt": [8]}}.get(along, {along: 1})
        one, other = draw(probabilities, keys(DRAWS)), draw(probabilities, keys(DRAWS, **differs))
    chance = float((probabilities**2).sum())
    same = float((one == other).double().mean())
    assert abs(same - chance) < 4 * (chance * (1 - chance) / DRAWS) ** 0.5


@pytest.mark.parametrize(("vocabulary", "rows"), [(1024, 4000), (49_152, 200)])
@pytest.mark.parametrize(("rounding", "flips"), [(1e-6, 0.0), (2e-2, 0.025)])
def test_rounding_hardly_ever_changes_a_token(vocabulary: int, rows: int, rounding: float, flips: float) -> None:
    """By inverting the cumulative distribution it would be a seventh and half of them."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    other = logits + rounding * torch.randn(rows, vocabulary, generator=generator)
    noise = make_exponential_noise(keys(rows), count_noise_values(vocabulary))
    changed = draw_tokens(logits.softmax(-1), noise) != draw_tokens(other.softmax(-1), noise)
    assert float(changed.double().mean()) <= flips


def test_draws_never_take_an_impossible_token() -> None:
    for possible in ([0], [88], [63], [64], [5, 70]):
        probabilities = torch.zeros(89)
        probabilities[possible] = 1e-30
        assert set(draw(probabilities, keys(500)).tolist()) == set(possible)


# --- completions of a model


def test_a_completion_depends_on_nothing_but_its_seed_prompt_and_branch() -> None:
    """Not on the portion, its neighbours, their order, the other branches or how many tokens may come."""
    lm = tiny("llama")

    def completions(prompts: list[list[int]], *, k: int = 2, max_tokens: int = 12, seed: int = 3, **how: int) -> list:
        return sample_completions(lm, prompts, k=k, max_tokens=max_tokens, seed=seed, **how).to_lists()

    together = completions(PROMPTS)
    assert completions(PROMPTS, token_budget=1) == together
    assert completions(PROMPTS[::-1]) == together[::-1]
    assert completions(PROMPTS[1:2]) == together[1:2]
    assert [branches[:1] for branches in together] == completions(PROMPTS, k=1)
    assert [[c[:5] for c in branches] for branches in together] == completions(PROMPTS, max_tokens=5)
    assert completions(PROMPTS, seed=4) != together
    twice = completions([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert twice[:2] == together[:2]
    assert len({tuple(c) for row in (0, 2) for c in twice[row]}) == 4, "a prompt that comes twice has other completions"


def test_the_cache_holds_no_more_tokens_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions of 12, 9 and 6 tokens with their prompts, two of each: 2 x 12 and 4 x 9, not 4 x 12 and 2 x 6."""
    held, room = set(), sampling._PreallocatedCacheLayer._allocate_cache

    def making(layer: sampling._PreallocatedCacheLayer, states: Tensor, dtype: torch.dtype) -> Tensor:
        made = room(layer, states, dtype)
        held.add((len(made), made.shape[2]))
        return made

    monkeypatch.setattr(sampling._PreallocatedCacheLayer, "_allocate_cache", making)
    sample_completions(tiny("llama"), PROMPTS, k=2, max_tokens=4, seed=0, token_budget=44)
    assert held == {(2, 12), (4, 9)}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_cache_takes_the_bytes_that_it_may(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from what is allocated for four completions of 12 tokens with their prompt."""
    lm = tiny(name)
    lm.network.precision = precision
    held, allocate = [], sampling._PreallocatedCacheLayer._allocate_cache

    def count_bytes(layer: sampling._PreallocatedCacheLayer, states: Tensor, dtype: torch.dtype) -> Tensor:
        made = allocate(layer, states, dtype)
        held.append(made.nbytes)
        return made

    monkeypatch.setattr(sampling._PreallocatedCacheLayer, "_allocate_cache", count_bytes)
    sample_completions(lm, [PROMPTS[0]], k=4, max_tokens=4, seed=0)
    assert count_cacheable_tokens(lm, sum(held)) == 48
    assert count_cacheable_tokens(lm, sum(held) - 1) == 47


def test_threads_change_no_token() -> None:
    lm, threads = tiny("llama"), torch.get_num_threads()
    sampled_tokens = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            sampled_tokens.append(sample_completions(lm, PROMPTS, k=4, max_tokens=20, seed=0).to_lists())
    finally:
        torch.set_num_threads(threads)
    assert sampled_tokens[0] == sampled_tokens[1]


def test_a_padded_vocabulary_is_seen_when_a_model_is_loaded(tmp_path: Path) -> None:
    model, tokenizer = initialize_world_model(0)
    size = len(tokenizer)
    model.resize_token_embeddings(size + 30)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = ModelLoader(torch.device("cpu")).load_policy(tmp_path)
    assert lm.unused_tokens == tuple(range(size, size + 30))
    sampled_tokens = sample_completions(lm, [[5, 6, 7]], k=50, max_tokens=20, seed=0)
    assert int(sampled_tokens.tokens.max()) < size
