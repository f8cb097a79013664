"""The network of one or several models: a transformers model with adapters and scalar heads, and its forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mixpo.data.branches import BranchBatch, DecodingBatch, PromptBatch
from mixpo.models.activation_checkpointing import checkpoint_activations
from mixpo.models.attention import (
    ATTENTION_NAME,
    capture_branch_attention,
    use_branch_attention,
    use_decoding_attention,
)
from mixpo.models.logprobs import compute_target_logprobs

Precision = Literal["float32", "bfloat16"]
Output = Literal["states", "logprobs", "entropies", "values", "scores", "logits"]
Batch = BranchBatch | PromptBatch | DecodingBatch


class Network(nn.Module):
    """A transformers model in memory, with the adapters and scalar heads of all models that share its weights.

    Every forward pass is a call of this module, so that hooks (sharding, compilation, activation checkpointing) see it.
    """

    def __init__(self, model: PreTrainedModel, *, precision: Precision = "float32", logit_scale: float = 1.0) -> None:
        """Wrap a model.

        Args:
            model: A causal language model or a classifier; its attention is replaced by `mixpo.models.attention`.
            precision: Type in which matrix products are computed.
            logit_scale: Factor of the logits (Granite, Cohere).
        """
        super().__init__()
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        self.heads = nn.ModuleDict()
        """Linear layers from hidden states to one number, by name."""
        self.precision = precision
        self.logit_scale = logit_scale
        self.adapter_names = set[str]()
        """Names of all adapters."""
        self.adapted_modules: list[Any] = []
        """Modules of peft that hold adapters, or copies of a module that trained whole."""
        self._active_adapters: tuple[str, ...] | None = ()

    @property
    def device(self) -> torch.device:
        """Device that holds the weights."""
        return next(self.parameters()).device

    def autocast(self) -> AbstractContextManager[Any]:
        """Context manager in which matrix products run in the network's precision, whatever type the weights have."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16", cache_enabled=True
        )

    def train(self, mode: bool = True) -> Self:
        """Prepare an update: only adapters' dropout is on, else PPO's ratio would not begin at 1; returns self."""
        super().train(False)
        self.training = mode
        for name, module in self.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def forward(
        self,
        batch: Batch,
        outputs: Sequence[Output],
        *,
        adapters: tuple[str, ...] = (),
        head: str | None = None,
        cache: Cache | None = None,
        detach_values: bool = False,
    ) -> tuple[Tensor, ...]:
        """Compute the named outputs of a batch under some adapters and a scalar head: see `LanguageModel.__call__`."""
        self._activate_adapters(adapters)
        states = self._compute_states(batch, cache)
        computed: dict[str, Tensor] = {"states": states}
        if isinstance(batch, BranchBatch):
            if "logprobs" in outputs or "entropies" in outputs:
                predictions = self._compute_logprobs(states, batch, with_entropy="entropies" in outputs)
                computed["logprobs"], computed["entropies"] = predictions
            if "values" in outputs:
                predictors = states.detach() if detach_values else states
                predictors = predictors.index_select(0, batch.predictor_index.flatten()).unflatten(0, batch.mask.shape)
                computed["values"] = self.get_head(head)(predictors.float())[..., 0].masked_fill(~batch.mask, 0.0)
            if "scores" in outputs:
                scores = self.get_head(head)(states[batch.last_token_index].float())
                computed["scores"] = scores.sum(dim=-1)  # of one number, and no view, of which `fully_shard` would warn
        elif "logits" in outputs:
            with self.autocast():
                computed["logits"] = self.model.get_output_embeddings()(
                    states[batch.last_token_index] * self.logit_scale
                )
        return tuple(computed[output] for output in outputs)

    def get_head(self, name: str | None) -> nn.Linear:
        """The scalar head of this name, or a classifier's own by `score`. Raises KeyError if there is none."""
        head: Any = self.model.score if name == "score" else self.heads[str(name)]
        assert isinstance(head, nn.Linear)
        return head

    def register_adapters(self, name: str, adapted_modules: Sequence[Any]) -> None:
        """Note that adapters of this name were added to the model; `adapted_modules` are all modules that hold any."""
        self.adapter_names.add(name)
        self.adapted_modules = list(adapted_modules)
        self._active_adapters = None

    def _activate_adapters(self, names: tuple[str, ...]) -> None:
        """Compute with these adapters and no others from now on; gradients stay with those that train."""
        if names == self._active_adapters:
            return
        for module in self.adapted_modules:  # set_adapter of peft would also choose what trains
            present = [name for name in names if name in getattr(module, module.adapter_layer_names[0])]
            if module.adapter_layer_names[0] == "modules_to_save":
                present = present[-1:]  # a whole module replaces the one before
            module._active_adapter = present
        self._active_adapters = names

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of layers for the backward pass, which computes the layers again, from now on."""

        def capture_pass() -> AbstractContextManager[None]:
            """Context manager in which layers compute as they do now: with these adapters and this attention."""
            return repeat_pass(self._active_adapters or (), capture_branch_attention())

        @contextmanager
        def repeat_pass(adapters: tuple[str, ...], attention: AbstractContextManager[None]) -> Iterator[None]:
            """Context manager of adapters, which stay until another pass, and of an attention."""
            self._activate_adapters(adapters)
            with attention:
                yield

        checkpoint_activations(self.model, capture_pass)

    def _compute_states(self, batch: Batch, cache: Cache | None) -> Float[Tensor, "positions width"]:
        """Last hidden states of a batch, [all tokens, width], under the attention of its kind of batch."""
        mask: Tensor | dict[str, Tensor] | None
        if isinstance(batch, DecodingBatch):
            mask, attention = self._make_new_token_mask(batch), use_decoding_attention(batch.lengths, self.device)
        else:
            # with four dimensions, so that transformers makes none
            unused_mask = torch.empty(1, 1, 1, 1, device=self.device)
            mask = make_attention_masks(self.model, lambda _: unused_mask) if batch.packed_lengths else None
            attention = use_branch_attention(batch.packed_lengths, self.device)
        with self.autocast(), attention:
            output = self.model.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        states: Tensor = output.last_hidden_state
        return states.flatten(0, 1)

    def _make_new_token_mask(self, batch: DecodingBatch) -> Tensor | dict[str, Tensor]:
        """Boolean attention mask of one new token a row over all keys, within the sliding window if there is one."""
        distance = batch.position_ids - torch.arange(max(batch.lengths), device=self.device)

        def make_mask(window: int | None = None) -> Tensor:
            """Mask [rows, 1, 1, keys]: True for keys up to the new token, within the window if given."""
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            return visible[:, None, None]

        return make_attention_masks(self.model, make_mask)

    def _compute_logprobs(
        self, states: Float[Tensor, "positions width"], batch: BranchBatch, *, with_entropy: bool
    ) -> tuple[Float[Tensor, "prompts k tokens"], Float[Tensor, "prompts k tokens"]]:
        """Log-probs and entropies (0 if not `with_entropy`), in nats, of a batch's completion tokens; 0 at padding."""
        logprobs, entropies = compute_target_logprobs(
            # not states[...]: its gradient adds what branches share in the threads' order
            states.index_select(0, batch.predictor_index[batch.mask]) * self.logit_scale,
            self.model.get_output_embeddings(),
            batch.completions[batch.mask],
            dtype=torch.bfloat16 if self.precision == "bfloat16" else torch.float32,
            with_entropy=with_entropy,
        )
        empty = torch.zeros(batch.mask.shape, device=states.device)
        return empty.masked_scatter(batch.mask, logprobs), empty.masked_scatter(batch.mask, entropies)


def iterate_matrix_modules(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, part) of all that multiplies by a weight matrix: linear layers, GPT-2's Conv1D, adapters, heads."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | Conv1D):
            yield name, part


def make_attention_masks(
    model: PreTrainedModel, make_mask: Callable[[int | None], Bool[Tensor, "rows 1 queries keys"]]
) -> Tensor | dict[str, Tensor]:
    """The attention mask in the model's form: one by `make_mask(window)`, or a dict with one for each layer type."""
    config = model.config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    types: set[str] = set(getattr(config, "layer_types", None) or ())
    if window is None or types == {"full_attention"} or getattr(config, "use_sliding_window", True) is False:
        return make_mask(None)
    if types in ({"sliding_attention"}, set()):
        return make_mask(window)
    return {"full_attention": make_mask(None), "sliding_attention": make_mask(window)}
