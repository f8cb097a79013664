"""Memory that models, passes and samplers take, in bytes, counted from a model's shape and the rows' lengths.

What a stage holds at one moment is a sum of `MemoryFootprint`s; what it needs is the largest over its moments.

    a model that trains whole   4 weights, 4 gradients, 8 Adam's moments: 16 bytes a weight
    a frozen model              2 a matrix weight in bfloat16 (4 in float32), 4 a weight of embeddings and norms
    adapters that train         16 a weight of theirs, on a frozen model that all models with adapters share
    a pass with gradients       what autograd keeps of every layer, plus one layer's temporaries
    a pass without              one layer's temporaries
    sampling                    keys and values of all tokens so far

On several devices they are the same on each, or cut: then every device gathers one layer at a time, embedding and head,
and, to sample, the policy.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch

from mixpo.data.branches import BranchLengths
from mixpo.models.attention import BranchLayout
from mixpo.models.blocked_attention import BLOCK_SCORES
from mixpo.models.logprobs import BLOCK_LOGITS, CHUNK_LOGITS, STORED_LOGIT_GRADIENTS
from mixpo.models.network import Precision
from mixpo.models.sampling import PREFILL_TOKENS, count_noise_values
from mixpo.models.shapes import ModelShape

PROCESS_BYTES = {"cpu": 490 * 2**20, "cuda": 2**30}
"""Of a process without models: with all imports, measured; CUDA's context and workspaces, about, not measured."""
NF4_BYTES = 0.5 + 4 / 64
"""Of a weight in 4 bits, with a scale for every 64."""
KERNEL_BYTES = 60 * 2**20
"""Of oneDNN's kernels for products in bfloat16 on a CPU, one a shape, measured over a few steps; over thousands of
different lengths up to 0.9 GB."""
HEAP_SHARE = {"whole": 0.5, "adapters": 1.5}
"""Memory that freed tensors leave in a CPU process's heap as holes that the next ones do not fit into, as a share of
what a training pass takes; measured with glibc at 1M to 20M weights. Adapters' small tensors lie between large ones. A
GPU's allocator has pools for both; not measured."""
GATHERED_LAYERS = 2
"""Layers whose weights a device has gathered at once: the one that computes, and the next."""
ADAM_BYTES = {"adamw": 8.0, "adamw-8bit": 2.0 + 8 / 256}
"""Of Adam's two moments, a weight; in 8 bits with two scales for every 256 weights."""

Gradients = Literal["all", "adapters", "none"]


@dataclass(frozen=True)
class MemoryFootprint:
    """Bytes on one device, by part."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    cache: float = 0
    process: float = 0

    @property
    def total(self) -> float:
        """Sum over all parts."""
        return float(sum(getattr(self, part.name) for part in fields(self)))

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class PlannedRuntime:
    """Where and how a stage computes, as far as memory depends on it."""

    device: Literal["cpu", "cuda"] = "cpu"
    processes: int = 1
    """Devices that share the rows of a stage, each with a process."""
    is_sharded: bool = False
    """Whether weights, gradients, moments and frozen networks are cut over them. Adapters stay whole."""
    microbatch_tokens: int = 2048
    sampling_bytes: int = 2 << 30
    activation_checkpointing: bool = False
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    offloads_optimizer: bool = False
    quantizes_frozen: bool = False
    """Whether the matrices of frozen networks are held in 4 bits."""

    @property
    def shards(self) -> int:
        """Parts into which weights are cut."""
        return self.processes if self.is_sharded else 1


@dataclass(frozen=True)
class AdapterSizes:
    """LoRA adapters of one model: the number of their weights, and sums over all adapted matrices."""

    weights: int
    ranks: int
    inputs: int
    has_dropout: bool = False


@dataclass(frozen=True)
class ModelInMemory:
    """A model in memory: frozen, or one that trains whole or by adapters."""

    shape: ModelShape
    network: Hashable
    """Name of the network that it stands on; frozen models and adapters of one network share its weights."""
    adapters: Hashable = None
    """Name of the adapters that it was trained by before, which models share too."""
    frozen_adapters: int = 0
    """Weights of these."""
    trained_adapters: AdapterSizes | None = None
    trains_whole: bool = False
    """True for a network of its own, of which all weights train."""
    is_reward_model: bool = False
    """True if a scalar head is read instead of the output head, which its network may have all the same."""

    @property
    def trained_weights(self) -> int:
        """Number of weights that train."""
        if self.trains_whole:
            return self.shape.weights
        return 0 if self.trained_adapters is None else self.trained_adapters.weights

    @property
    def multiplied_weights(self) -> tuple[int, int]:
        """(trained, frozen) numbers of weights that a token is multiplied by."""
        shape = self.shape.as_reward_model() if self.is_reward_model else self.shape
        if self.trains_whole:
            return shape.multiplied_weights, 0
        if self.trained_adapters is None:
            return 0, shape.multiplied_weights + self.frozen_adapters
        trained_head = shape.width if self.is_reward_model else 0
        trained = self.trained_weights + trained_head
        return trained, shape.multiplied_weights - trained_head + self.frozen_adapters


def count_element_bytes(precision: Precision) -> int:
    """Bytes of a number in which matrix products are computed."""
    return 2 if precision == "bfloat16" else 4


def measure_process(precision: Precision, runtime: PlannedRuntime) -> MemoryFootprint:
    """Footprint of a process without models."""
    has_kernels = runtime.device == "cpu" and precision == "bfloat16"
    return MemoryFootprint(process=PROCESS_BYTES[runtime.device] + (KERNEL_BYTES if has_kernels else 0))


# Models


def measure_models(models: Iterable[ModelInMemory], precision: Precision, runtime: PlannedRuntime) -> MemoryFootprint:
    """Footprint of models that are in memory together, each network and each adapter once."""
    total, networks, adapters = MemoryFootprint(), dict[Hashable, MemoryFootprint](), dict[Hashable, int]()
    for model in models:
        if model.trains_whole:
            total += measure_trained_weights(model.shape.weights, runtime)
            continue
        networks[model.network] = measure_frozen_network(model.shape, precision, runtime)
        adapters[model.network, model.adapters] = model.frozen_adapters
        if model.trained_adapters is not None:
            total += measure_trained_weights(model.trained_adapters.weights, replace(runtime, is_sharded=False))
    frozen = MemoryFootprint(weights=4 * sum(adapters.values()))
    return total + frozen + sum(networks.values(), MemoryFootprint())


def measure_trained_weights(count: int, runtime: PlannedRuntime) -> MemoryFootprint:
    """Footprint of weights that train: in float32, with gradients and Adam's moments."""
    share = count / runtime.shards
    is_offloaded = runtime.offloads_optimizer and runtime.device == "cuda"
    moments = 0.0 if is_offloaded else ADAM_BYTES[runtime.optimizer]
    return MemoryFootprint(weights=4 * share, gradients=4 * share, optimizer=moments * share)


def measure_frozen_network(shape: ModelShape, precision: Precision, runtime: PlannedRuntime) -> MemoryFootprint:
    """Footprint of a network without gradients, held in the precision that it computes in.

    In bfloat16 norms stay in float32, and the embedding too unless it is stored in bfloat16; an output head tied to a
    float32 embedding then has a tensor of its own. In 4 bits are all matrices but the output head.
    """
    narrow = NF4_BYTES if runtime.quantizes_frozen else count_element_bytes(precision)
    if precision == "float32":
        others = shape.weights - shape.matrix_weights
        return MemoryFootprint(weights=(narrow * shape.matrix_weights + 4 * others) / runtime.shards)
    has_wide_embedding = shape.stored_dtype != "bfloat16"
    own_head = shape.head_weights if has_wide_embedding or not shape.is_tied else 0
    matrices = narrow * shape.matrix_weights + 2 * (shape.expert_weights + own_head)
    others = (4 if has_wide_embedding else 2) * shape.embedding_weights + 4 * shape.other_weights
    return MemoryFootprint(weights=(matrices + others) / runtime.shards)


def measure_working_weights(
    model: ModelInMemory, precision: Precision, runtime: PlannedRuntime, *, whole: bool = False
) -> MemoryFootprint:
    """Footprint of the weights in the type that products are computed in, beside those that are held.

    On one device autocast casts the matrices of a trained model, until its backward pass is over. On several, the
    weights of a few layers, embedding and head are gathered; with `whole`, those of all layers. Embedding and
    head are gathered as they are held.
    """
    shape, element = model.shape, count_element_bytes(precision)
    if runtime.shards == 1:
        is_cast = model.trains_whole and precision == "bfloat16"
        return MemoryFootprint(weights=2 * (shape.matrix_weights + shape.head_weights) if is_cast else 0)
    own_head = 0 if shape.is_tied else shape.head_weights
    inside = shape.weights - shape.embedding_weights - own_head
    is_wide = model.trains_whole or shape.stored_dtype != "bfloat16"
    outside = (4 if is_wide else element) * shape.embedding_weights + (4 if model.trains_whole else element) * own_head
    share = 1 if whole else min(1, GATHERED_LAYERS / shape.layers)
    return MemoryFootprint(weights=outside + element * share * inside)


# Passes


def measure_training_pass(
    model: ModelInMemory,
    rows: Sequence[BranchLengths],
    precision: Precision,
    runtime: PlannedRuntime,
    *,
    predicts: bool,
) -> MemoryFootprint:
    """Footprint of a microbatch's forward and backward pass, as the backward pass begins.

    `predicts` is False for scores and values, which need no logits.
    """
    shape = model.shape
    kept = count_kept_bytes(shape, rows, precision, runtime.device, model.trained_adapters)
    if runtime.activation_checkpointing:  # the input of every layer, and all of the layer that is computed again
        kept = 4 * shape.width * shape.layers * count_row_tokens(rows) + kept / shape.layers
    passed = MemoryFootprint(activations=kept + count_temporary_bytes(shape, rows, precision, runtime.device))
    if predicts:
        predicted = sum(sum(row[1:]) for row in rows)
        passed += measure_logits(shape, predicted, precision, runtime.device, head_trains=model.trains_whole)
    if runtime.shards > 1 and model.trains_whole:  # of one layer or of the embedding, before the devices add theirs
        outside = shape.embedding_weights + (0 if shape.is_tied else shape.head_weights)
        gathered = max(outside, (shape.weights - outside) / shape.layers)
        passed += MemoryFootprint(gradients=(4 + count_element_bytes(precision)) * gathered)
    unused = HEAP_SHARE["whole" if model.trains_whole else "adapters"] if runtime.device == "cpu" else 0.0
    return passed + MemoryFootprint(activations=unused * passed.activations, logits=unused * passed.logits)


def measure_scoring_pass(
    shape: ModelShape,
    rows: Sequence[BranchLengths],
    precision: Precision,
    runtime: PlannedRuntime,
    *,
    predicts: bool,
) -> MemoryFootprint:
    """Footprint of a microbatch's forward pass without gradients."""
    temporary = count_temporary_bytes(shape, rows, precision, runtime.device)
    predicted = shape.vocabulary * sum(sum(row[1:]) for row in rows) if predicts else 0
    chunks = count_element_bytes(precision) * min(predicted, CHUNK_LOGITS)
    return MemoryFootprint(activations=temporary, logits=chunks + 3 * 4 * min(predicted, BLOCK_LOGITS[runtime.device]))


def count_row_tokens(rows: Sequence[BranchLengths]) -> int:
    """Tokens of a microbatch, every prompt once."""
    return sum(map(sum, rows))


def count_kept_bytes(
    shape: ModelShape, rows: Sequence[BranchLengths], precision: Precision, device: str, adapters: AdapterSizes | None
) -> float:
    """Bytes that autograd keeps of all layers of a forward pass for its backward pass.

    - Norms keep their inputs in float32, and what they have normalized where their weights train.
    - A matrix that trains, or has an adapter, keeps its input. In bfloat16 each has a cast copy of its own; in float32
      those that read the same input share it.
    - The feed-forward part keeps the gate's and up's outputs, and the gate's activations; without a gate one of them.
    - Attention keeps queries, keys, values and outputs, in its padded buckets on a CPU (`BucketLayout`), where
      the completions of a prompt each have a copy of its keys and values.
    """
    tokens, element = count_row_tokens(rows), count_element_bytes(precision)
    query_slots, key_slots = count_attention_slots(rows, device)
    keeps_normalized = shape.norms_keep_output and adapters is None
    norms = 4 * shape.normalized_width * (2 if keeps_normalized else 1)
    readers = shape.attention_readers + shape.feed_forward_readers
    shared_readers = 2 * shape.layers if precision == "float32" else readers
    inputs = shared_readers * shape.width + shape.query_width + shape.hidden_width
    low_rank = 0.0
    if adapters is not None:
        inputs = min(inputs, adapters.inputs)
        low_rank = adapters.ranks * element
        if adapters.has_dropout:  # a mask, and in float32 an input of its own for every adapter
            low_rank += (4 if device == "cpu" else 1) * adapters.inputs
            low_rank += 4 * (adapters.inputs - inputs) if precision == "float32" else 0
    feed_forward = shape.hidden_columns + shape.activation_width
    layers = tokens * (norms + low_rank + element * (inputs + feed_forward))
    attention = element * (2 * shape.query_width * query_slots + shape.key_value_width * key_slots)
    return layers + attention


def count_attention_slots(rows: Sequence[BranchLengths], device: str) -> tuple[int, int]:
    """(queries, keys) that attention keeps a layer and head: with padding and copied prompts on a CPU, else tokens."""
    if device != "cpu":
        return count_row_tokens(rows), count_row_tokens(rows)
    queries = keys = 0
    for bucket in BranchLayout(rows, torch.device("cpu")).bucket_layout.buckets:
        (prompts, prompt), (completions, completion) = bucket.prompt_shape, bucket.completion_shape
        queries += prompts * prompt + completions * completion
        keys += prompts * prompt + completions * (prompt + completion)
    return queries, keys


def count_temporary_bytes(shape: ModelShape, rows: Sequence[BranchLengths], precision: Precision, device: str) -> float:
    """Bytes of one layer's temporary tensors, in either direction: of its feed-forward part or of its attention."""
    tokens, element = count_row_tokens(rows), count_element_bytes(precision)
    query_slots, key_slots = count_attention_slots(rows, device)
    states = 3 * 4 * shape.width * tokens
    feed_forward = element * (shape.hidden_columns + shape.activation_width + shape.hidden_width) * tokens
    attention = element * 2 * (2 * shape.query_width * query_slots + shape.key_value_width * key_slots)
    longest = max((row[0] + max(row[1:], default=0) for row in rows), default=0)
    scores = min(BLOCK_SCORES, shape.heads * query_slots * longest) if device == "cpu" else 0
    return states + max(feed_forward / shape.layers, attention / shape.layers + 3 * element * scores)


def measure_logits(
    shape: ModelShape, predicted_tokens: int, precision: Precision, device: str, *, head_trains: bool
) -> MemoryFootprint:
    """Footprint of log-probs with their gradients: chunks of logits, and all of their gradients if these are few.

    The gradient of the head's weights, in float32, is made before it is added to an earlier one.
    """
    element = count_element_bytes(precision)
    states = 3 * element * shape.width * predicted_tokens
    logits = predicted_tokens * shape.vocabulary
    chunk = element * min(logits, CHUNK_LOGITS)
    blocks = 3 * 4 * min(logits, BLOCK_LOGITS[device])
    if not head_trains:
        return MemoryFootprint(logits=states + chunk + blocks)
    kept = element * logits if logits <= STORED_LOGIT_GRADIENTS else chunk
    return MemoryFootprint(logits=states + kept + blocks + (4 + (element == 2) * 2) * shape.head_weights)


# Sampling


def count_cache_bytes(shape: ModelShape, precision: Precision) -> int:
    """Bytes of the keys and values of one token, all layers."""
    return count_element_bytes(precision) * shape.key_value_width


def measure_sampling(
    shape: ModelShape,
    prompts: Sequence[int],
    precision: Precision,
    runtime: PlannedRuntime,
    *,
    k: int,
    max_tokens: int,
) -> MemoryFootprint:
    """Footprint of sampling k completions of prompts of these lengths: key-value cache, prefill and logits."""
    element = count_element_bytes(precision)
    own_prompts = sorted(prompts, reverse=True)[:: runtime.processes]
    capacity = max(own_prompts, default=0) + max_tokens
    token_bytes = count_cache_bytes(shape, precision)
    fitting = max(1, runtime.sampling_bytes // token_bytes // k // max(1, capacity))
    batch = own_prompts[:fitting]
    cache = len(batch) * k * capacity * token_bytes
    prefill: list[BranchLengths] = [(prompt,) for prompt in batch]
    while len(prefill) > 1 and count_row_tokens(prefill) > PREFILL_TOKENS[runtime.device]:
        prefill.pop()
    temporary = count_temporary_bytes(shape, prefill, precision, runtime.device)
    rows = len(batch) * k
    noise = 24 * rows * count_noise_values(shape.vocabulary)
    logits = rows * shape.vocabulary
    blocks = 3 * 4 * min(logits, BLOCK_LOGITS[runtime.device])
    shrinking = cache / shape.layers  # rows that go on are copied a layer at a time
    return MemoryFootprint(cache=cache + shrinking, activations=temporary, logits=2 * element * logits + noise + blocks)
