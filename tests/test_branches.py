"""Branch batches compute what one plain forward pass a sequence computes, token by token."""

from collections import Counter
from functools import partial
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixpo.data.branches import (
    BranchBatch,
    count_tokens_per_prompt,
    pack_branches,
    pack_prompts,
    split_into_microbatches,
)
from mixpo.models import attention as attention_module
from mixpo.models import blocked_attention, sampling
from mixpo.models.adapters import LoraSettings, add_lora
from mixpo.models.language_model import LanguageModel
from mixpo.models.logprobs import _TokenLogprobs
from mixpo.models.sampling import sample_completions
from models import ARCHITECTURES, assert_plain_logprobs, plain_logprobs, tiny

PROMPTS = [[3, 9, 4, 11, 7, 8, 9, 10], [12, 13], [20, 21, 22, 23, 24]]
COMPLETIONS = [
    [[30, 31, 32, 33, 34, 35, 5], [40, 5]],
    [[0, 0, 7, 5], [41, 42, 43, 44, 45, 46, 47, 48, 49]],
    [[50], [51, 52, 53, 5]],
]


@pytest.fixture(params=["plain", "in small blocks", "in many buckets", "by PyTorch"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes at which work is cut are those of real rows; and a GPU's road, taken on the CPU."""
    if request.param == "in small blocks":
        monkeypatch.setattr(blocked_attention, "BLOCK_QUERIES", 3)
        monkeypatch.setattr(blocked_attention, "BLOCK_SCORES", 100)
    if request.param == "in many buckets":
        monkeypatch.setattr(attention_module, "BUCKET_COST_IN_PAIRS", {"cpu": 0})
        monkeypatch.setattr(attention_module, "DECODING_BUCKET_COST_IN_KEYS", {"cpu": 0})
    if request.param == "by PyTorch":
        monkeypatch.setattr(attention_module, "BLOCKED_ATTENTION_DEVICES", frozenset())


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("k", [1, 2])
def test_logprobs_equal_plain_forward_passes(name: str, k: int) -> None:
    lm, completions = tiny(name), [branches[:k] for branches in COMPLETIONS]
    compare_with_plain(lm, pack_branches(PROMPTS, completions), completions)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_of_unshared_prompts_equal_plain_forward_passes(name: str) -> None:
    compare_with_plain(tiny(name), pack_branches(PROMPTS, COMPLETIONS, share_prompt=False), COMPLETIONS)


def compare_with_plain(lm: LanguageModel, batch: BranchBatch, completions: list[list[list[int]]]) -> None:
    with torch.no_grad():
        assert_plain_logprobs(lm.model, PROMPTS, completions, lm(batch, "logprobs"), 1e-5)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_gradients_equal_plain_forward_passes(name: str) -> None:
    lm = tiny(name)
    weights = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(1))
    logprobs = lm(pack_branches(PROMPTS, COMPLETIONS), "logprobs")
    (logprobs * weights).sum().backward()
    actual = {key: p.grad.clone() for key, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    total = torch.zeros(())
    for row, (prompt, branches) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        for branch, completion in enumerate(branches):
            expected = plain_logprobs(lm.model, prompt, completion)
            total = total + (expected * weights[row, branch, : len(completion)]).sum()
    total.backward()
    assert actual
    for key, parameter in lm.model.named_parameters():
        torch.testing.assert_close(
            actual[key], parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: key + text
        )


@pytest.mark.parametrize("stored", [0, 1 << 20])
@pytest.mark.parametrize(("chunk", "block"), [(14, 7), (28, 21), (1 << 20, 14), (1 << 20, 1 << 20)])
def test_fused_logprobs_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, stored: int, chunk: int, block: int
) -> None:
    monkeypatch.setattr("mixpo.models.logprobs.CHUNK_LOGITS", chunk)
    monkeypatch.setattr("mixpo.models.logprobs.BLOCK_LOGITS", {"cpu": block})
    monkeypatch.setattr("mixpo.models.logprobs.STORED_LOGIT_GRADIENTS", stored)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=generator, requires_grad=True)
    weight = torch.randn(7, 3, generator=generator, requires_grad=True)
    bias = torch.randn(7, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    upstream = torch.randn(5, generator=generator)
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, bias, targets, torch.float32, True, True)
    logits = (hidden @ weight.T + bias).double()
    expected = logits.log_softmax(-1)[range(5), targets]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    expected_entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-6)
    actual = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight, bias))
    autograd_gradients = torch.autograd.grad((expected * upstream).sum(), (hidden, weight, bias))
    for first, second in zip(actual, autograd_gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("learns", [(True, False, False), (False, True, False), (False, False, True)])
def test_recomputed_gradients_equal_stored_ones(
    monkeypatch: pytest.MonkeyPatch, learns: tuple[bool, bool, bool], rows: int
) -> None:
    """In bfloat16, for one of hidden, weight and bias at a time."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 16), (40, 16), (40,))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    targets, upstream = torch.tensor([0, 39, 3, 3, 1])[:rows], torch.randn(rows, generator=generator)
    monkeypatch.setattr("mixpo.models.logprobs.CHUNK_LOGITS", 35)
    actual = []
    for stored in (0, 1 << 20):
        monkeypatch.setattr("mixpo.models.logprobs.STORED_LOGIT_GRADIENTS", stored)
        inputs = [value.clone().requires_grad_(learn) for value, learn in zip(values, learns, strict=True)]
        logprobs, _ = _TokenLogprobs.apply(*inputs, targets, torch.bfloat16, False, True)
        (logprobs * upstream).sum().backward()
        assert [value.grad is not None for value in inputs] == list(learns)
        actual.append(inputs[learns.index(True)].grad)
    torch.testing.assert_close(*actual, rtol=0.02, atol=0.02)
    assert rows == 0 or actual[0].abs().max() > 0.2


def test_entropy_is_that_of_the_predicting_distribution() -> None:
    lm = tiny("llama")
    with torch.no_grad():
        entropy = lm(pack_branches(PROMPTS, COMPLETIONS), "entropies")
        logits = lm.model(input_ids=torch.tensor([PROMPTS[0] + COMPLETIONS[0][1]])).logits[0]
    expected = torch.distributions.Categorical(logits=logits[len(PROMPTS[0]) - 1]).entropy()
    torch.testing.assert_close(entropy[0, 1, 0], expected, rtol=1e-5, atol=1e-5)


def test_score_is_read_at_the_last_token_whatever_the_padding_id() -> None:
    """Completions here hold the padding id 0 and end with or without an end token."""
    lm = tiny("llama")
    head = torch.nn.Linear(32, 1, bias=False)
    lm.network.heads["test"], lm.head = head, "test"
    with torch.no_grad():
        actual, values = lm(pack_branches(PROMPTS, COMPLETIONS), "scores", "values")
        for row, (prompt, branches) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            for branch, completion in enumerate(branches):
                states = lm.model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
                torch.testing.assert_close(actual[row, branch], head(states[-1])[0], rtol=1e-5, atol=1e-5)
                expected = head(states[len(prompt) - 1 : -1])[:, 0]
                torch.testing.assert_close(values[row, branch, : len(completion)], expected, rtol=1e-5, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), budget=st.integers(1, 120))
@settings(max_examples=50, deadline=None)
def test_microbatches_are_a_partition_within_the_budget(lengths: list[int], budget: int) -> None:
    for padded in (False, True):
        parts = list(split_into_microbatches(lengths, budget, count_padding=padded))
        assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
        for part in parts:
            sizes = [lengths[row] for row in part]
            assert len(part) == 1 or (len(part) * max(sizes) if padded else sum(sizes)) <= budget


@pytest.mark.parametrize(
    ("prompts", "completions"), [([[1]], [[[]]]), ([[]], [[[1]]]), ([[1], [2]], [[[1]], [[1], [2]]])]
)
def test_pack_refuses_empty_prompts_and_completions(prompts: list, completions: list) -> None:
    with pytest.raises(ValueError, match=r"without tokens|same number"):
        pack_branches(prompts, completions)
    with pytest.raises(ValueError, match="found a prompt without tokens"):
        pack_prompts([[1, 2], []])


def test_row_lengths_are_of_prompts_with_their_completions() -> None:
    assert count_tokens_per_prompt([[1, 2], [3]], [[[4], [5, 6]], [[7]]]) == [5, 2]
    with pytest.raises(ValueError, match="zip"):
        count_tokens_per_prompt([[1, 2], [3]], [[[4], [5, 6]]])


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("shares_prompts", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kept_logprobs_equal_plain_forward_passes(
    name: str, shares_prompts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, dropped = tiny(name), list[int]()
    lm.shares_prompts = shares_prompts
    original = sampling._PreallocatedCacheLayer.select_cache_rows

    def select_rows(layer: sampling._PreallocatedCacheLayer, rows: torch.Tensor) -> None:
        dropped.append(len(layer.keys) - len(rows))
        original(layer, rows)

    draw = partial(sample_completions, lm, PROMPTS, k=3, max_tokens=10, seed=1, temperature=1.5, top_k=40)
    monkeypatch.setattr(sampling._PreallocatedCacheLayer, "select_cache_rows", select_rows)
    lm.end_tokens = frozenset()
    token_counts = Counter(token for row in draw().to_lists() for completion in row for token in set(completion[:-1]))
    assert not dropped
    end = token_counts.most_common(1)[0][0]  # so that several rows end early
    lm.end_tokens = frozenset({end})
    sampled = draw()
    early = sampled.lengths < 10
    assert early.any()
    assert not early.all()
    assert sum(dropped) > 0
    assert_plain_logprobs(lm.model, PROMPTS, sampled.to_lists(), sampled.logprobs, 2e-5)
    for completion in chain.from_iterable(sampled.to_lists()):
        assert end not in completion[:-1], "nothing is drawn after the end token"
        assert completion[-1] == end or len(completion) == 10


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("shares_prompts", [True, False])
def test_prefill_in_portions_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, family: str, shares_prompts: bool
) -> None:
    lm = tiny(family)
    lm.shares_prompts = shares_prompts
    whole = sample_completions(lm, PROMPTS, k=2, max_tokens=8, seed=3)
    monkeypatch.setitem(sampling.PREFILL_TOKENS, "cpu", len(PROMPTS[0]) + 1)
    read = []
    monkeypatch.setattr(sampling, "pack_prompts", lambda prompts, **how: read.append(1) or pack_prompts(prompts, **how))
    in_portions = sample_completions(lm, PROMPTS, k=2, max_tokens=8, seed=3)
    assert torch.equal(in_portions.tokens, whole.tokens)
    torch.testing.assert_close(in_portions.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
    assert len(read) > 1


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 80))
def test_buckets_of_new_tokens_are_a_partition_with_little_padding(keys: list[int], bucket_cost: int) -> None:
    keys = sorted(keys, reverse=True)
    buckets = list(attention_module._split_by_key_count(keys, bucket_cost))
    assert [row for rows, _ in buckets for row in range(rows.start, rows.stop)] == list(range(len(keys)))
    for rows, most in buckets:
        assert most == max(keys[rows])
        assert sum(most - own for own in keys[rows]) <= bucket_cost
    for (rows, most), (after, _) in pairwise(buckets):
        assert sum(most - own for own in keys[rows.start : after.start + 1]) > bucket_cost, "the next row had no room"


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_an_update_sees_the_model_that_sampled(name: str) -> None:
    """The base model's dropout is off; the adapters' own is on."""
    lm = tiny(name)
    batch = pack_branches(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        before = lm(batch, "logprobs")
        lm.model.train()
        assert not torch.allclose(lm(batch, "logprobs"), before), "the test's model has dropout"
        lm.train()
        assert torch.equal(lm(batch, "logprobs"), before)
    add_lora(lm, LoraSettings(rank=2, dropout=0.5))
    lm.train()
    dropouts = [module for module in lm.model.modules() if isinstance(module, torch.nn.Dropout) and module.training]
    assert dropouts
    assert {module.p for module in dropouts} == {0.5}


def test_scalar_heads_compute_in_float32() -> None:
    lm = tiny("llama")
    lm.network.heads["test"], lm.head = torch.nn.Linear(32, 1, bias=False), "test"
    lm.network.precision = "bfloat16"
    with torch.no_grad():
        scores, values = lm(pack_branches(PROMPTS, COMPLETIONS), "scores", "values")
    assert scores.dtype == values.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("share_row", [True, False])
def test_states_of_prompts_equal_plain_forward_passes(share_row: bool) -> None:
    lm = tiny("llama")
    batch = pack_prompts(PROMPTS, share_row=share_row)
    with torch.no_grad():
        actual = lm(batch, "states")
        lm.model.set_attn_implementation("eager")
        for row, prompt in enumerate(PROMPTS):
            expected = lm.model.base_model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
            torch.testing.assert_close(actual[batch.token_index[row, : len(prompt)]], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(actual[batch.last_token_index[row]], expected[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "kv_heads", "held"), [(5, 5, 2, 150), (4, 7, 4, 60), (7, 9, 1, 60), (5, 5, 2, 60)]
)
def test_blocked_attention_is_attention(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, kv_heads: int, held: int
) -> None:
    """With a last group of rows that is smaller, too, and values narrower than keys."""
    monkeypatch.setattr(blocked_attention, "BLOCK_QUERIES", 3)
    monkeypatch.setattr(blocked_attention, "BLOCK_SCORES", held)
    torch.manual_seed(0)
    heads, rows = 4, 3
    shapes = ((queries, heads, 3), (keys, kv_heads, 3), (keys, kv_heads, 2))
    query, key, value = (torch.randn(rows, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    mask_bias = torch.full((rows, queries, keys), float("-inf"), dtype=torch.float64).triu(1 + keys - queries)
    mask_bias[1, :, 1] = mask_bias[2, 1:, 0] = float("-inf")

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return blocked_attention.blocked_attention(*tensors, mask_bias, 0.7)

    copied = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, next(copied)) * 0.7 + mask_bias[:, None]
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), next(copied))
    torch.testing.assert_close(ours(query, key, value), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (query, key, value))


def test_blocked_attention_in_bfloat16_is_within_its_rounding() -> None:
    torch.manual_seed(0)
    shapes = ((2, 200, 6, 64), (2, 200, 3, 64), (2, 200, 3, 64))
    tensors = [torch.randn(*shape).bfloat16().requires_grad_() for shape in shapes]
    mask_bias = torch.full((1, 200, 200), float("-inf")).triu(1)
    upstream = torch.randn(2, 200, 6, 64).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        read = [x.detach().to(dtype).requires_grad_() for x in tensors]
        actual = blocked_attention.blocked_attention(*read, mask_bias.to(dtype), 64**-0.5)
        results.append([actual.detach(), *torch.autograd.grad(actual, read, upstream.to(dtype))])
    for narrow, wide in zip(*results, strict=True):
        assert narrow.dtype == torch.bfloat16
        assert float((narrow.double() - wide).norm() / wide.norm()) < 2e-2  # half a unit of eight bits is 2e-3


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_decoding_attention_is_attention(kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, *shape, 8).to(dtype) for shape in ((4, 1), (kv_heads, 7), (kv_heads, 7)))
    visible = torch.rand(3, 1, 1, 7) < 0.6
    visible[..., -1] = True
    actual = attention_module._attend_new_tokens(query, key, value, visible, None)
    key, value = (x.double().repeat_interleave(4 // kv_heads, dim=1) for x in (key, value))
    scores = (query.double() @ key.transpose(-1, -2) / 8**0.5).masked_fill(~visible, float("-inf"))
    expected = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
