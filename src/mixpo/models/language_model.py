"""The model class of all stages: log-probs, scores and values of branch batches, and next-token logits."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from mixpo.data.tokens import compute_tokenization_digest, decode_completion
from mixpo.models.network import Batch, Network, Output, Precision, iterate_matrix_modules


@dataclass(eq=False)
class LanguageModel:
    """A policy or a reward model: a network, the adapters and the scalar head that it computes with, and its tokenizer.

    Models that differ in adapters and head alone can share a network.
    """

    network: Network
    tokenizer: PreTrainedTokenizerBase
    end_token: int
    """Token at the end of a training completion."""
    shares_prompts: bool = True
    """Whether several completions of a prompt in one row compute the same as in rows of their own."""
    dtype: torch.dtype = torch.float32
    """Type of the weights on disk, where they are loaded from and saved to."""
    folder: Path | None = None
    """Folder of the network's weights, without adapters, if any."""
    end_tokens: frozenset[int] = frozenset()
    """All tokens that end a sampled completion."""
    unused_tokens: tuple[int, ...] = ()
    """Ids without a token in the tokenizer (a padded vocabulary). Never sampled, though the softmax includes them."""
    adapters: tuple[str, ...] = ()
    """Names of the network's adapters whose sum this model adds to the weights; the newest is the last."""
    head: str | None = None
    """Name of the scalar head that computes scores or values, if there is one."""
    is_reward_model: bool = False
    """Whether it scores completions and predicts no tokens."""

    def __post_init__(self) -> None:
        self.end_tokens |= {self.end_token}

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model of the network."""
        return self.network.model

    @property
    def precision(self) -> Precision:
        """Type in which the network's matrix products are computed."""
        return self.network.precision

    @property
    def score_head(self) -> nn.Linear:
        """The scalar head that computes scores or values. Raises KeyError if there is none."""
        return self.network.get_head(self.head)

    @property
    def device(self) -> torch.device:
        """Device that holds the weights."""
        return self.network.device

    @property
    def tokenization_digest(self) -> str:
        """Digest of how text becomes tokens, 16 hex digits: equal for two models with the same tokens."""
        return compute_tokenization_digest(self.tokenizer)

    def decode_completion(self, completion: Sequence[int]) -> str:
        """Text of a completion's tokens, without its end token and other special tokens."""
        ended = [*completion[:-1], self.end_token] if self.has_ended(completion) else completion
        return decode_completion(self.tokenizer, ended)

    def has_ended(self, completion: Sequence[int]) -> bool:
        """True if the last token of a completion is an end token, False if the completion was cut off."""
        return completion[-1] in self.end_tokens

    def autocast(self) -> AbstractContextManager[Any]:
        """Context manager in which matrix products run in the model's precision."""
        return self.network.autocast()

    def train(self) -> None:
        """Prepare an update: turn on the dropout of adapters, and nothing else."""
        self.network.train()

    def eval(self) -> None:
        """Prepare computations without an update: turn off all dropout."""
        self.network.eval()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights that this model computes with."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the network, weight) of all that this model computes with, not others' adapters and heads."""
        return ((name, part) for name, part in self.network.named_parameters() if self._computes_with(name))

    def count_multiplied_weights(self) -> tuple[int, int]:
        """(trained, frozen) numbers of weights that a token is multiplied by: matrices, adapters and heads.

        Of experts, only those that a token is routed to. Embeddings, norms and biases are in no matrix product.
        """
        counts = {True: 0, False: 0}
        head = self.model.get_output_embeddings() if self.is_reward_model else None
        unused = set() if head is None else set(head.modules())
        for name, module in iterate_matrix_modules(self.network):
            if self._computes_with(f"{name}.weight") and module not in unused:
                linear = isinstance(module, nn.Linear)  # in 4 bits, two weights are one number
                size = module.in_features * module.out_features if linear else module.weight.numel()
                counts[module.weight.requires_grad] += size
        for weight in self.parameters():
            if weight.ndim == 3:  # all experts of a layer
                visited = getattr(self.model.config.get_text_config(), "num_experts_per_tok", len(weight))
                counts[weight.requires_grad] += weight[:visited].numel()
        return counts[True], counts[False]

    def _computes_with(self, name: str) -> bool:
        """True for the name of a weight of the network, unless it is of another model, or of a module replaced here."""
        parts = name.split(".")
        if parts[0] == "heads" or parts[:2] == ["model", "score"]:
            return self.head in parts
        for kind in ("lora_A", "lora_B"):
            if kind in parts:
                return parts[parts.index(kind) + 1] in self.adapters
        for kind in ("original_module", "modules_to_save"):
            if kind in parts:
                place = parts.index(kind)
                copies: Any = self.network.get_submodule(".".join(parts[:place])).modules_to_save
                present = [adapter for adapter in self.adapters if adapter in copies]  # the newest replaces the others
                return parts[place + 1 :][:1] == present[-1:] if kind == "modules_to_save" else not present
        return True

    @overload
    def __call__(self, batch: Batch, output: Output, /, *, cache: Cache | None = None) -> Tensor: ...
    @overload
    def __call__(
        self, batch: Batch, /, *outputs: Output, cache: Cache | None = None, detach_values: bool = False
    ) -> tuple[Tensor, ...]: ...
    def __call__(
        self, batch: Batch, /, *outputs: Output, cache: Cache | None = None, detach_values: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Compute the named outputs of a batch, such as `logprobs`: one tensor, or a tuple in the order of the names.

        - `states` [rows * length, width]: the last hidden state of every token of the batch's rows, flattened.
        - `logprobs` [prompts, k, tokens]: log-probs of the completion tokens in nats, at temperature 1.
        - `entropies` [prompts, k, tokens]: entropies of the next-token distributions in nats, without a gradient.
        - `values` [prompts, k, tokens]: values in reward units, read where each completion token is predicted.
        - `scores` [prompts, k]: the reward model's score of every completion, read at its last token.
        - `logits` [prompts, vocabulary]: of the token after each prompt, or after the newest token.

        Per-token outputs are 0 where the batch's mask is false. Logits are computed only where a token is predicted,
        in chunks; scalar heads compute in float32. `cache` receives keys and values. `detach_values` stops the gradient
        of the values at the hidden states.
        """
        computed: tuple[Tensor, ...] = self.network(
            batch, outputs, adapters=self.adapters, head=self.head, cache=cache, detach_values=detach_values
        )
        return computed[0] if len(computed) == 1 else computed
