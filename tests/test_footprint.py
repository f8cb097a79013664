"""The memory plan's arithmetic, counted on real tensors: weights, gradients, moments, what autograd keeps, caches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixpo.data.branches import pack_branches
from mixpo.models.adapters import LoraSettings, add_lora
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Network
from mixpo.models.sampling import sample_completions
from mixpo.models.shapes import MatrixShape, count_model_sizes, read_model_shape
from mixpo.models.weight_types import freeze_network
from mixpo.training import footprint
from mixpo.training.footprint import (
    AdapterSizes,
    MemoryFootprint,
    ModelInMemory,
    PlannedRuntime,
    count_kept_bytes,
    measure_frozen_network,
    measure_models,
    measure_sampling,
    measure_trained_weights,
    measure_training_pass,
)
from mixpo.training.step import OptimizerSettings, make_optimizer
from models import ARCHITECTURES, tiny

ROWS = [(8, 5, 4), (6, 3, 5), (9, 2, 2)]
SMALL = LlamaConfig(
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=90,
    tie_word_embeddings=True,
)


def make_small(precision: str = "float32", **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL.to_dict(), **changes})
    return LanguageModel(Network(LlamaForCausalLM(config), precision=precision), None, -1)  # type: ignore[arg-type]


def count_storages(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of tensors, those that share memory once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def count_bytes_kept_by_autograd(lm: LanguageModel, rows: Sequence[tuple[int, ...]]) -> int:
    """Bytes that the graph of a pass to the last hidden states keeps, without weights and their copies."""
    shapes = {shape for weight in lm.network.parameters() for shape in (weight.shape, weight.shape[::-1])}
    kept = list[torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in shapes and tensor.is_floating_point():
            kept.append(tensor)
        return tensor

    batch = pack_branches([[1] * row[0] for row in rows], [[[2] * length for length in row[1:]] for row in rows])
    lm.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm(batch, "states")
    return count_storages(kept)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_count_every_weight_once(name: str) -> None:
    lm = tiny(name)
    shape = count_model_sizes(lm.model)
    assert shape.weights == sum(weight.numel() for weight in lm.model.parameters())
    assert shape.vocabulary == lm.model.get_output_embeddings().weight.shape[0]
    assert shape.is_tied == (lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight)


def test_shape_of_llama_2_is_read_from_its_config_alone() -> None:
    shape = read_model_shape(LlamaConfig(), "Llama")  # transformers' defaults are its sizes
    assert shape.weights == 6_738_415_616
    assert shape.as_reward_model().weights == 6_738_415_616 - 32_000 * 4096 + 4096
    assert shape.key_value_width == 2 * 32 * 4096
    assert shape.matrices[0] == MatrixShape("model.layers.0.self_attn.q_proj", 4096, 4096)


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_model_takes_weights_gradients_and_two_moments(tied: bool) -> None:
    lm = make_small(tie_word_embeddings=tied)
    optimizer = make_optimizer(lm.parameters(), OptimizerSettings(learning_rate=1e-3))
    batch = pack_branches([[1, 2, 3]], [[[4, 5]]])
    lm(batch, "logprobs").sum().backward()
    optimizer.step()
    weights = list(lm.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    planned = measure_models(
        [ModelInMemory(count_model_sizes(lm.model), None, trains_whole=True)], "float32", PlannedRuntime()
    )
    assert planned.weights == count_storages(weights)
    assert planned.gradients == count_storages([weight.grad for weight in weights if weight.grad is not None])
    assert planned.optimizer == count_storages(moments)
    assert planned.total == 4 * planned.weights


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_network_is_held_in_the_precision_that_it_computes_in(precision: Any, tied: bool) -> None:
    lm = make_small(precision, tie_word_embeddings=tied)
    freeze_network(lm.network)
    planned = measure_frozen_network(read_model_shape(lm.model.config, "small"), precision, PlannedRuntime())
    assert planned == MemoryFootprint(weights=count_storages(list(lm.network.parameters())))


def test_an_embedding_that_is_stored_in_bfloat16_stays_so() -> None:
    shape = count_model_sizes(make_small().model)
    wide = measure_frozen_network(shape, "bfloat16", PlannedRuntime())
    narrow = measure_frozen_network(replace(shape, stored_dtype="bfloat16"), "bfloat16", PlannedRuntime())
    assert wide.weights - narrow.weights == 90 * 32 * (4 + 2 - 2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [ROWS, [row[:2] for row in ROWS]], ids=["two sides", "one side"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_what_autograd_keeps_of_a_llama(lora: bool, rows: list[tuple[int, ...]], precision: Any) -> None:
    lm = make_small(precision)
    shape, adapters = count_model_sizes(lm.model), None
    if lora:
        freeze_network(lm.network)
        add_lora(lm, LoraSettings(rank=3))
        adapters = AdapterSizes(0, 3 * len(shape.matrices), sum(one.inputs for one in shape.matrices))
    counted = count_bytes_kept_by_autograd(lm, rows)
    planned = count_kept_bytes(shape, rows, precision, "cpu", adapters)
    assert planned == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_autograd_keeps_of_other_architectures(name: str) -> None:
    lm = tiny(name)
    counted = count_bytes_kept_by_autograd(lm, ROWS)
    assert count_kept_bytes(count_model_sizes(lm.model), ROWS, "float32", "cpu", None) == pytest.approx(
        counted, rel=0.2
    )


def test_a_microbatch_of_dropped_inputs_is_kept_once_an_adapter() -> None:
    lm = make_small()
    shape = count_model_sizes(lm.model)
    freeze_network(lm.network)
    add_lora(lm, LoraSettings(rank=3, dropout=0.5))
    adapters = AdapterSizes(0, 3 * len(shape.matrices), sum(one.inputs for one in shape.matrices), has_dropout=True)
    counted = count_bytes_kept_by_autograd(lm, ROWS)
    assert count_kept_bytes(shape, ROWS, "float32", "cpu", adapters) == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_of_a_training_pass(precision: Any) -> None:
    """A trained head keeps the gradients of all logits if they are few; a frozen one keeps states alone."""
    shape = replace(count_model_sizes(make_small().model), vocabulary=50_000, head_weights=50_000 * 32)
    element = 4 if precision == "float32" else 2
    trained = footprint.measure_logits(shape, 100, precision, "cpu", head_trains=True).logits
    frozen = footprint.measure_logits(shape, 100, precision, "cpu", head_trains=False).logits
    assert trained > 100 * 50_000 * element + 4 * 50_000 * 32
    assert frozen < trained
    many = footprint.measure_logits(shape, 100_000, precision, "cpu", head_trains=False).logits
    assert many < 3 * footprint.CHUNK_LOGITS * element


def test_the_cache_of_sampling_is_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixpo.models import sampling

    allocated = list[torch.Tensor]()
    allocate = sampling._PreallocatedCacheLayer._allocate_cache

    def record(self: Any, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        allocated.append(allocate(self, states, dtype))
        return allocated[-1]

    monkeypatch.setattr(sampling._PreallocatedCacheLayer, "_allocate_cache", record)
    lm = make_small()
    prompts = [7, 9, 8]
    sample_completions(lm, [[1] * length for length in prompts], k=2, max_tokens=6, seed=0)
    shape = count_model_sizes(lm.model)
    planned = measure_sampling(shape, prompts, "float32", PlannedRuntime(), k=2, max_tokens=6)
    assert planned.cache == count_storages(allocated) * (1 + 1 / shape.layers)  # one layer's copy as rows finish


def test_a_small_budget_bounds_the_cache() -> None:
    shape = read_model_shape(LlamaConfig(), "Llama")
    options: dict[str, Any] = {"k": 1, "max_tokens": 512}
    runtime = PlannedRuntime("cuda", sampling_bytes=16 << 30)
    planned = measure_sampling(shape, [512] * 1000, "bfloat16", runtime, **options)
    assert 0.9 * 2**34 < planned.cache < 1.1 * 2**34
    half = measure_sampling(shape, [512] * 1000, "bfloat16", replace(runtime, sampling_bytes=8 << 30), **options)
    assert half.cache == pytest.approx(planned.cache / 2, rel=0.1)


def test_adapters_on_one_network_share_its_weights() -> None:
    shape = read_model_shape(LlamaConfig(), "Llama")
    adapters = AdapterSizes(20_000_000, 1000, 1000)
    trained = ModelInMemory(shape, "base", trained_adapters=adapters)
    frozen = [ModelInMemory(shape, "base", name, 10_000_000) for name in ("SFT", "reward", "SFT")]
    planned = measure_models([trained, *frozen], "bfloat16", PlannedRuntime())
    base = measure_frozen_network(shape, "bfloat16", PlannedRuntime())
    assert planned == base + MemoryFootprint(weights=4 * 20_000_000) + measure_trained_weights(
        20_000_000, PlannedRuntime()
    )
    assert planned.weights == pytest.approx(13.9e9, rel=0.02)
    apart = measure_models([ModelInMemory(shape, "one"), ModelInMemory(shape, "other")], "bfloat16", PlannedRuntime())
    assert apart == base + base


def test_a_base_in_four_bits_takes_about_half_a_byte_a_weight() -> None:
    shape = read_model_shape(LlamaConfig(), "Llama")
    planned = measure_frozen_network(shape, "bfloat16", PlannedRuntime("cuda", quantizes_frozen=True))
    assert planned.weights == pytest.approx(0.5625 * 32 * 202_375_168 + 131_072_000 * (4 + 2), rel=0.01)


def test_devices_share_what_is_held() -> None:
    model = ModelInMemory(read_model_shape(LlamaConfig(), "Llama"), None, trains_whole=True)
    one, eight = (
        measure_models([model], "bfloat16", PlannedRuntime("cuda", processes=count, is_sharded=True))
        for count in (1, 8)
    )
    assert eight.total == one.total / 8
    layers = footprint.measure_working_weights(model, "bfloat16", PlannedRuntime("cuda", processes=8, is_sharded=True))
    policy = footprint.measure_working_weights(
        model, "bfloat16", PlannedRuntime("cuda", processes=8, is_sharded=True), whole=True
    )
    outside = 2 * 32_000 * 4_096
    """Embedding and head, in float32; the layers are in bfloat16."""
    assert policy.weights == 2 * (6_738_415_616 - outside) + 4 * outside
    assert 4 * outside < layers.weights < 4 * outside + policy.weights / 8


@pytest.mark.parametrize(
    ("change", "part", "factor"),
    [
        ({"optimizer": "adamw-8bit"}, "optimizer", 0.254),
        ({"offloads_optimizer": True}, "optimizer", 0),
        ({"processes": 4, "is_sharded": True}, "gradients", 0.25),
        ({"processes": 4}, "gradients", 1),
    ],
)
def test_settings_of_the_optimizer(change: dict[str, Any], part: str, factor: float) -> None:
    before, after = (measure_trained_weights(1000, PlannedRuntime("cuda", **one)) for one in ({}, change))
    assert getattr(after, part) == pytest.approx(factor * getattr(before, part), rel=0.01)


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    model = ModelInMemory(read_model_shape(LlamaConfig(), "Llama"), None, trains_whole=True)
    rows = [(512, 512)] * 4

    def count_activations(**settings: Any) -> float:
        return measure_training_pass(
            model, rows, "bfloat16", PlannedRuntime("cuda", **settings), predicts=False
        ).activations

    kept, inputs = count_activations(), count_activations(activation_checkpointing=True)
    assert 32 * 4096 * 4 * 4096 < inputs < kept / 8
