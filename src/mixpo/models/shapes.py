"""Sizes of a decoder, counted in its modules without reading or reserving a weight."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from mixpo.models.folders import explain_loading_errors

EXPECTED_CONFIG = "expected the config of a decoder-only language model"

SEVERAL_STEPS = {"NewGELUActivation", "FastGELUActivation"}
"""Activation functions of transformers that autograd sees as several operations."""


@dataclass(frozen=True)
class MatrixShape:
    """A weight matrix of a decoder layer: the name of its module and its sizes."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """Numbers of weights of a decoder, and the sizes of what its layers compute for one token.

    Sizes a token are sums over all layers.
    """

    width: int
    layers: int
    vocabulary: int
    matrices: tuple[MatrixShape, ...]
    """Matrices of all layers."""
    embedding_weights: int
    head_weights: int
    """Of the output head, also where they are the embedding's; 0 in a reward model."""
    is_tied: bool
    """True if embedding and output head are one tensor."""
    expert_weights: int
    visited_expert_weights: int
    """Those of the experts that one token is routed to."""
    other_weights: int
    """Norms and biases."""
    attention_readers: int
    """Matrices that read the attention's input, of all layers; each reads `width` numbers."""
    feed_forward_readers: int
    """Likewise of the feed-forward part."""
    heads: int
    query_width: int
    """Queries of a token, all layers."""
    key_value_width: int
    """Keys and values of a token, all layers."""
    hidden_columns: int
    """Outputs of the feed-forward part's first matrices, gate and up together."""
    hidden_width: int
    """Inputs of its last matrix."""
    activation_steps: int
    """Intermediate results of an activation function that is written as several operations, such as GPT-2's."""
    normalized_width: int
    """Inputs of all norms."""
    norms_keep_output: bool
    """True for norms that keep what they have normalized for the gradient of their weights, such as Llama's."""
    stored_dtype: str
    """Type of the weights on disk, by its name in PyTorch."""

    @property
    def weights(self) -> int:
        """Number of weights; those of a tied head count once."""
        head = 0 if self.is_tied else self.head_weights
        return self.embedding_weights + head + self.matrix_weights + self.expert_weights + self.other_weights

    @property
    def matrix_weights(self) -> int:
        """Weights of the layers' matrices."""
        return sum(matrix.inputs * matrix.outputs for matrix in self.matrices)

    @property
    def multiplied_weights(self) -> int:
        """Weights that a token is multiplied by in a forward pass, its head's too; of experts, those that it visits."""
        return self.matrix_weights + (self.head_weights or self.width) + self.visited_expert_weights

    @property
    def activation_width(self) -> int:
        """Numbers between the feed-forward part's first and last matrices: of a gate, or of an activation's steps."""
        gate = self.hidden_width if self.hidden_columns > self.hidden_width else 0
        return gate + self.activation_steps * self.hidden_width

    def as_reward_model(self) -> Self:
        """The shape with a scalar head in place of the output head."""
        return replace(self, head_weights=0, is_tied=False, other_weights=self.other_weights + self.width)

    def select_matrices(self, targets: str | tuple[str, ...]) -> list[MatrixShape]:
        """The matrices that adapters are added to: all, or those whose names end with one of the targets."""
        if isinstance(targets, str):
            return list(self.matrices)
        return [one for one in self.matrices if any(f".{one.name}".endswith(f".{target}") for target in targets)]


def read_model_shape(config: PretrainedConfig, source: str) -> ModelShape:
    """Count the sizes of a causal language model on the meta device. Raises `InputError`, naming the source."""
    with explain_loading_errors(source, "no decoder", EXPECTED_CONFIG), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return count_model_sizes(model)


def read_hub_config(hub_id: str, revision: str | None = None) -> PretrainedConfig:
    """Read the config of a Hugging Face id from this machine's cache; no server is asked. Raises `InputError`."""
    fix = f"expected it in the cache (hf download {hub_id} config.json); or name a config.json by --config"
    with explain_loading_errors(hub_id, "no config on this machine", fix):
        return AutoConfig.from_pretrained(
            hub_id, revision=revision or "main", trust_remote_code=False, local_files_only=True
        )


def read_config_file(path: Path) -> PretrainedConfig:
    """Read a `config.json`, or that of a folder, which needs no weights. Raises `InputError`."""
    file = path / "config.json" if path.is_dir() else path
    with explain_loading_errors(file, "no config that can be read", EXPECTED_CONFIG):
        return AutoConfig.from_pretrained(file, trust_remote_code=False, local_files_only=True)


def read_gguf_config(file: Path) -> PretrainedConfig:
    """Read the config in a GGUF file. Raises `InputError`."""
    with explain_loading_errors(file, "a GGUF file whose config cannot be read", EXPECTED_CONFIG):
        return AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
        )


def count_model_sizes(model: Any) -> ModelShape:
    """Count the sizes of a transformers model, which may be on the meta device."""
    text = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    modules = dict(model.named_modules())
    matrices = [
        MatrixShape(name, *(module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]))
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and module.weight is not None
    ]
    visited = getattr(text, "num_experts_per_tok", None)
    experts = [(name, weight) for name, weight in model.named_parameters() if weight.ndim == 3]
    visited_parts = [(name, weight[: visited or len(weight)]) for name, weight in experts]
    attention = [one for one in matrices if "attn" in one.name or "attention" in one.name]
    attention += [one for one in matrices if one not in attention and one.name.endswith(("k_proj", "v_proj", "q_proj"))]
    feed_forward = [one for one in matrices if one not in attention]
    reading, writing = _split_last_of_layer(feed_forward)
    attention_reading, _ = _split_last_of_layer(attention)
    norms = [
        (name, module.weight)
        for name, module in modules.items()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    ]
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    key_size, value_size = getattr(text, "qk_head_dim", head_size), getattr(text, "v_head_dim", None) or head_size
    layers = text.num_hidden_layers
    norm_inputs = {"q_norm": heads * head_size, "k_norm": key_heads * head_size}
    embeddings = sum(one.weight.numel() for one in modules.values() if isinstance(one, nn.Embedding))
    head_weights = 0 if head is None else head.weight.numel()
    is_tied = head is not None and head.weight is embedding.weight
    expert_weights = sum(weight.numel() for _, weight in experts)
    total = sum(weight.numel() for weight in model.parameters())
    counted = embeddings + (0 if is_tied else head_weights) + expert_weights
    counted += sum(one.inputs * one.outputs for one in matrices)
    width = text.hidden_size
    downs = [weight for name, weight in visited_parts if "down" in name]
    ups = [weight for name, weight in visited_parts if "down" not in name]
    return ModelShape(
        width=width,
        layers=layers,
        vocabulary=text.vocab_size,
        matrices=tuple(matrices),
        embedding_weights=embeddings,
        head_weights=head_weights,
        is_tied=is_tied,
        expert_weights=expert_weights,
        visited_expert_weights=sum(weight.numel() for _, weight in visited_parts),
        other_weights=total - counted,
        attention_readers=len(attention_reading),
        feed_forward_readers=len(reading) + len(ups),
        heads=heads,
        query_width=layers * heads * head_size,
        key_value_width=layers * key_heads * (key_size + value_size),
        hidden_columns=sum(one.outputs for one in reading) + sum(weight.numel() // width for weight in ups),
        hidden_width=sum(one.inputs for one in writing) + sum(weight.numel() // width for weight in downs),
        activation_steps=3 if SEVERAL_STEPS & {type(module).__name__ for module in modules.values()} else 0,
        normalized_width=sum(norm_inputs.get(name.rpartition(".")[2], width) for name, _ in norms),
        norms_keep_output=any("RMS" in type(module).__name__ for module in modules.values()),
        stored_dtype=str(getattr(model.config, "dtype", None) or "float32").removeprefix("torch."),
    )


def _split_last_of_layer(matrices: list[MatrixShape]) -> tuple[list[MatrixShape], list[MatrixShape]]:
    """Split matrices, in the order of their layers, into the last one of every layer and all others."""
    layers: dict[str, list[MatrixShape]] = {}
    for matrix in matrices:
        number = next((part for part in matrix.name.split(".") if part.isdigit()), "")
        layers.setdefault(number, []).append(matrix)
    return [one for layer in layers.values() for one in layer[:-1]], [layer[-1] for layer in layers.values()]
