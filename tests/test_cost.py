"""Model FLOPs against what PyTorch counts in a forward and a backward pass: matrix products, attention left out."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

from mixpo.models.adapters import LoraSettings, add_lora
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Network
from mixpo.models.weight_types import freeze_network
from mixpo.training.record import Cost
from models import END, tiny

IDS = torch.tensor([[3, 9, 4, 11, 7, 8, 9, 10, 60, 61]])


def reward_model() -> LanguageModel:
    lm = tiny("llama")
    lm.model.config.num_labels = 1
    model = LlamaForSequenceClassification(lm.model.config).eval()
    return LanguageModel(Network(model), None, END, head="score", is_reward_model=True)


def count_flops(model: Any, *, backward: bool) -> int:
    """FLOPs of matrix products by weights; gradients go down to what the layers read."""
    model.set_attn_implementation("eager")
    states = model.get_input_embeddings()(IDS).detach().requires_grad_(backward)
    with FlopCounterMode(display=False) as counter:
        logits = model(inputs_embeds=states).logits
        if backward:
            logits.sum().backward()
    products = counter.get_flop_counts()["Global"]
    return sum(products.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


MODELS = ("llama", "gpt2", "gemma3", "opt", "reward")


def build(name: str, *, lora: bool) -> LanguageModel:
    lm = reward_model() if name == "reward" else tiny(name)
    if lora:
        freeze_network(lm.network)
        add_lora(lm, LoraSettings(rank=3))
        if lm.head is not None:
            lm.model.score.requires_grad_(True)  # counted by PyTorch; the adapted model's is a copy
    return lm


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_pytorch_counts(name: str, lora: bool) -> None:
    lm, cost = build(name, lora=lora), Cost()
    cost.add_scored_tokens(lm, IDS.numel())
    assert cost.flops == count_flops(lm.model, backward=False)
    cost = Cost()
    cost.add_trained_tokens(lm, IDS.numel())
    assert cost.flops == count_flops(lm.model, backward=True)
    counts = cost.get_counts()
    assert [counts[f"tokens_{kind}"] for kind in ("sampled", "trained", "scored")] == [0, IDS.numel(), 0]


def test_lora_costs_two_thirds_of_training_whole_and_a_little_more() -> None:
    whole, adapted = Cost(), Cost()
    whole.add_trained_tokens(build("llama", lora=False), 10)
    adapted.add_trained_tokens(build("llama", lora=True), 10)
    trained, frozen = build("llama", lora=True).count_multiplied_weights()
    assert 0 < trained < frozen
    assert adapted.flops == pytest.approx(whole.flops * 2 / 3 + 60.0 * trained)


def test_drawn_tokens_and_their_prompts_go_forward_once() -> None:
    lm, cost = build("gpt2", lora=False), Cost()
    cost.add_sampled_tokens(lm, 4, 6)
    assert (cost.tokens_sampled, cost.flops) == (4, count_flops(lm.model, backward=False))


def test_peak_memory_is_the_gpus_where_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("is_initialized", True), ("max_memory_allocated", 7 << 19)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    assert Cost().summarize()["peak_memory_mib"] == 3.5


def test_of_experts_those_count_that_a_token_visits() -> None:
    """By hand: 4 d^2 of attention, the gate, and 2 of 8 experts of 3 d m weights in each layer; the head."""
    layers, width, inner, vocabulary = 2, 16, 24, 31
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
    )
    trained, frozen = LanguageModel(Network(model), None, 0).count_multiplied_weights()
    gates = layers * 8 * width
    without_gates = layers * (4 * width**2 + 2 * 3 * width * inner) + vocabulary * width
    assert trained in (without_gates, without_gates + gates), "the gate may be a linear layer or not, by version"
    assert frozen == 0
