"""Layers that are computed again in the backward pass give the same gradients and keep less."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixpo.data.branches import BranchBatch, pack_branches
from mixpo.data.errors import InputError
from mixpo.models.activation_checkpointing import checkpoint_activations
from mixpo.models.adapters import LoraSettings, add_lora
from mixpo.models.language_model import LanguageModel
from models import ARCHITECTURES, tiny

PROMPTS = [[3, 9, 4, 11, 7, 8, 9, 10], [12, 13], [20, 21, 22, 23, 24]]
COMPLETIONS = [[[30, 31, 5], [40, 5]], [[7, 5], [41, 42, 43, 44, 45, 46]], [[50], [51, 52, 53, 5]]]
BATCHES = (pack_branches(PROMPTS, COMPLETIONS), pack_branches(PROMPTS[::-1], COMPLETIONS[1:] + COMPLETIONS[:1]))
"""Two layouts, since the second forward pass comes before the first one's backward pass."""


def compute_gradients(lm: LanguageModel, compute_logprobs: Callable[[BranchBatch], Tensor]) -> dict[str, Tensor]:
    lm.model.zero_grad()
    torch.manual_seed(0)
    first, second = (compute_logprobs(batch) for batch in BATCHES)
    loss = (first * torch.arange(first.numel()).view_as(first) / 9).sum() - second.square().sum()
    backward = threading.Thread(target=loss.backward)  # as PyTorch does on a GPU
    backward.start()
    backward.join()
    return {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_the_same(name: str, precision: str) -> None:
    lm = tiny(name)
    lm.network.precision = precision
    plain = compute_gradients(lm, lm_logprobs(lm))
    lm.network.checkpoint_activations()
    again = compute_gradients(lm, lm_logprobs(lm))
    assert again.keys() == plain.keys()
    for key, gradient in again.items():
        torch.testing.assert_close(gradient, plain[key], rtol=1e-6, atol=1e-6)


def test_the_dropout_of_adapters_repeats() -> None:
    lm = tiny("llama")
    lm.network.checkpoint_activations()
    add_lora(lm, LoraSettings(rank=2, dropout=0.5))
    for name, parameter in lm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lm.train()
    again = compute_gradients(lm, lm_logprobs(lm))
    for layer in lm.model.model.layers:
        del layer.forward
    plain = compute_gradients(lm, lm_logprobs(lm))
    assert again.keys() == plain.keys() != set()
    for key, gradient in again.items():
        torch.testing.assert_close(gradient, plain[key], rtol=1e-6, atol=1e-6)
    lm.eval()
    assert any(not torch.allclose(x, plain[key]) for key, x in compute_gradients(lm, lm_logprobs(lm)).items())


def test_layers_are_computed_again_with_the_adapters_of_their_pass() -> None:
    """The second pass is without adapters, and comes before the first one's backward pass."""
    lm = tiny("llama")
    plain = replace(lm)
    add_lora(lm, LoraSettings(rank=2))
    for name, parameter in lm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def compute() -> dict[str, Tensor]:
        lm.model.zero_grad()
        loss = lm(BATCHES[0], "logprobs").sum()
        with torch.no_grad():
            plain(BATCHES[1], "logprobs")
        loss.backward()
        return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}

    expected = compute()
    lm.network.checkpoint_activations()
    again = compute()
    assert again.keys() == expected.keys() != set()
    for key, gradient in again.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-6, atol=1e-6)


def lm_logprobs(lm: LanguageModel) -> Callable[[BranchBatch], Tensor]:
    return lambda batch: lm(batch, "logprobs")


def test_less_is_kept_for_the_backward_pass() -> None:
    """Of two layers only their inputs, which checkpointing keeps without PyTorch's hooks: counted here by hand."""
    lm = tiny("llama")
    before = count_saved_bytes(lm)
    lm.network.checkpoint_activations()
    layer_inputs = 2 * BATCHES[0].input_ids.numel() * 32 * 4
    assert count_saved_bytes(lm) + layer_inputs < 0.5 * before


def count_saved_bytes(lm: LanguageModel) -> int:
    parameters = {parameter.data_ptr() for parameter in lm.model.parameters()}
    saved: dict[int, int] = {}

    def save(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        lm(BATCHES[0], "states").sum()
    return sum(saved.values())


def test_sampling_and_reference_passes_are_left_alone() -> None:
    lm = tiny("llama")
    lm.network.checkpoint_activations()
    with torch.no_grad():
        assert torch.equal(lm(BATCHES[0], "logprobs"), tiny("llama")(BATCHES[0], "logprobs"))


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"runtime.activation_checkpointing: found Linear, .* expected decoder layers"):
        checkpoint_activations(torch.nn.Linear(2, 2), nullcontext)
