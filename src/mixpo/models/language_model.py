"""The model class of all stages: log-probs, scores and values of branch batches, and next-token logits."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from mixpo.data.branches import BranchBatch, DecodingBatch, PromptBatch
from mixpo.data.tokens import compute_tokenization_digest, decode_completion
from mixpo.models.attention import ATTENTION_NAME, use_branch_attention, use_decoding_attention

Precision = Literal["float32", "bfloat16"]
Output = Literal["states", "logprobs", "entropies", "values", "scores", "logits"]
Batch = BranchBatch | PromptBatch | DecodingBatch

CHUNK_LOGITS = 1 << 25
"""Logits in memory at once: 128 MiB in float32."""
BLOCK_LOGITS = {"cpu": 1 << 18, "cuda": CHUNK_LOGITS}
"""Logits cast to float32 at once: 1 MiB on a CPU, so that they stay in its caches; a whole chunk on a GPU."""
STORED_LOGIT_GRADIENTS = 1 << 27
"""Most gradients of logits that are stored for the backward pass: 256 MiB in bfloat16."""


class LanguageModel(nn.Module):
    """A transformers model and its tokenizer: a causal language model, or a classifier with a scalar `score` head.

    Every forward pass is a call of this module, so that hooks (sharding, compilation, activation checkpointing) see it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        end_token: int,
        *,
        shares_prompts: bool,
        precision: Precision = "float32",
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
        end_tokens: frozenset[int] = frozenset(),
        logit_scale: float = 1.0,
        unused_tokens: tuple[int, ...] = (),
    ) -> None:
        """Wrap a model.

        Args:
            model: The network; its attention is replaced by that of `mixpo.models.attention`.
            tokenizer: The network's tokenizer.
            end_token: Token at the end of a training completion.
            shares_prompts: Whether several completions of a prompt in one row compute the same as in rows of their own.
            precision: Type in which matrix products are computed.
            dtype: Type of the weights on disk, where they are loaded from and saved to.
            folder: Folder of the weights, if any.
            end_tokens: Further tokens that end a sampled completion.
            logit_scale: Factor of the logits (Granite, Cohere).
            unused_tokens: Ids without a token in the tokenizer (a padded vocabulary). Never sampled, though the
                softmax includes them.
        """
        super().__init__()
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        self.value_head: nn.Module | None = None
        """Maps hidden states to values; None where the model's own `score` head does."""
        self.tokenizer = tokenizer
        self.end_token = end_token
        self.shares_prompts = shares_prompts
        self.precision = precision
        self.dtype = dtype
        self.folder = folder
        self.end_tokens = end_tokens | {end_token}
        self.logit_scale = logit_scale
        self.unused_tokens = unused_tokens
        self.adapters_enabled = True
        """False on a view that computes without its adapters (`make_view_without_adapters`)."""

    @property
    def device(self) -> torch.device:
        """Device that holds the weights."""
        return next(self.parameters()).device

    @property
    def tokenization_digest(self) -> str:
        """Digest of how text becomes tokens, 16 hex digits: equal for two models with the same tokens."""
        return compute_tokenization_digest(self.tokenizer)

    def make_view_without_adapters(self) -> Self:
        """This model as it was before its adapters were added: another object on the same network, without a copy."""
        view = copy.copy(self)
        view.adapters_enabled = False
        return view

    def decode_completion(self, completion: Sequence[int]) -> str:
        """Text of a completion's tokens, without its end token and other special tokens."""
        ended = [*completion[:-1], self.end_token] if self.has_ended(completion) else completion
        return decode_completion(self.tokenizer, ended)

    def has_ended(self, completion: Sequence[int]) -> bool:
        """True if the last token of a completion is an end token, False if the completion was cut off."""
        return completion[-1] in self.end_tokens

    def autocast(self) -> AbstractContextManager[Any]:
        """Context manager in which matrix products run in the model's precision; weights stay in float32."""
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

    if TYPE_CHECKING:

        @overload
        def __call__(self, batch: Batch, output: Output, /, *, cache: Cache | None = None) -> Tensor: ...
        @overload
        def __call__(
            self, batch: Batch, /, *outputs: Output, cache: Cache | None = None, detach_values: bool = False
        ) -> tuple[Tensor, ...]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Compute outputs of a batch, as `forward` does."""

    def forward(
        self, batch: Batch, *outputs: Output, cache: Cache | None = None, detach_values: bool = False
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
        with nullcontext() if self.adapters_enabled else _disable_adapters(self.model):
            states = self._compute_states(batch, cache)
        computed: dict[str, Tensor] = {"states": states}
        if isinstance(batch, BranchBatch):
            if "logprobs" in outputs or "entropies" in outputs:
                predictions = self._compute_logprobs(states, batch, with_entropy="entropies" in outputs)
                computed["logprobs"], computed["entropies"] = predictions
            if "values" in outputs:
                head = self.model.score if self.value_head is None else self.value_head
                read = states.detach() if detach_values else states
                read = read.index_select(0, batch.predictor_index.flatten()).unflatten(0, batch.mask.shape)
                computed["values"] = head(read.float())[..., 0].masked_fill(~batch.mask, 0.0)
            if "scores" in outputs:
                computed["scores"] = self.model.score(states[batch.last_token_index].float())[..., 0]
        elif "logits" in outputs:
            with self.autocast():
                computed["logits"] = self.model.get_output_embeddings()(
                    states[batch.last_token_index] * self.logit_scale
                )
        results = tuple(computed[output] for output in outputs)
        return results[0] if len(results) == 1 else results

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
        head = self.model.get_output_embeddings()
        logprobs, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            # not states[...]: its gradient adds what branches share in the threads' order
            states.index_select(0, batch.predictor_index[batch.mask]) * self.logit_scale,
            head.weight,
            head.bias,
            batch.completions[batch.mask],
            torch.bfloat16 if self.precision == "bfloat16" else torch.float32,
            with_entropy,
            torch.is_grad_enabled(),
        )
        empty = torch.zeros(batch.mask.shape, device=states.device)
        return empty.masked_scatter(batch.mask, logprobs), empty.masked_scatter(batch.mask, entropies)


@contextmanager
def _disable_adapters(model: nn.Module) -> Iterator[None]:
    """Compute without adapters inside the context."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def iterate_matrix_modules(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that multiply by a weight matrix: linear layers and GPT-2's Conv1D, adapters and heads too."""
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield module


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


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight^T + bias)[target] of each row, in chunks, so that not all logits are in memory.

    d logprob / d logits = onehot(target) - softmax overwrites the logits of a chunk. The forward pass multiplies it by
    the weight at once: the gradient of `hidden` is that product times a factor a row. The gradient of `weight` needs
    d logits of all rows, which are stored if they are few, and computed again in chunks of columns if they are many.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n width"],
        weight: Float[Tensor, "vocabulary width"],
        bias: Float[Tensor, " vocabulary"] | None,
        targets: Int[Tensor, " n"],
        dtype: torch.dtype,
        with_entropy: bool,
        needs_gradient: bool,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        hidden_cast, weight_cast = hidden.to(dtype), weight.to(dtype)
        logprobs, entropies, normalizers = torch.zeros(3, len(targets), device=hidden.device)
        hidden_directions = torch.empty_like(hidden_cast) if needs_gradient else None
        needs_weight_gradient = needs_gradient and any(ctx.needs_input_grad[1:3])
        fits = len(targets) * len(weight) <= STORED_LOGIT_GRADIENTS
        logit_gradients = hidden_cast.new_empty(len(targets), len(weight)) if needs_weight_gradient and fits else None
        for rows in iterate_row_slices(len(targets), CHUNK_LOGITS // len(weight)):
            logits = torch.mm(
                hidden_cast[rows], weight_cast.T, out=None if logit_gradients is None else logit_gradients[rows]
            )
            logprobs[rows], entropies[rows], normalizers[rows] = _compute_logprobs_from_logits(
                logits, bias, targets[rows], with_entropy, needs_gradient
            )
            if hidden_directions is not None:
                hidden_directions[rows] = logits @ weight_cast
        ctx.save_for_backward(hidden_cast, weight_cast, bias, targets, normalizers, hidden_directions, logit_gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, " n"], _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers, hidden_directions, logit_gradients = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        needed = ctx.needs_input_grad[:3]
        hidden_gradient = (hidden_directions * gradient[:, None]).to(hidden_dtype)
        weight_gradient = torch.empty_like(weight, dtype=weight_dtype) if needed[1] else None
        bias_gradient = torch.empty_like(bias) if needed[2] else None
        if weight_gradient is None and bias_gradient is None:
            return hidden_gradient, *[None] * 7
        scaled = (hidden * gradient[:, None]).to(hidden.dtype)
        for columns in iterate_row_slices(len(weight), CHUNK_LOGITS // max(1, *hidden.shape)):
            if logit_gradients is None:
                logit_gradient = _compute_logit_gradient(hidden, weight, bias, targets, normalizers, columns)
            else:
                logit_gradient = logit_gradients[:, columns]
            if weight_gradient is not None:
                weight_gradient[columns] = logit_gradient.T @ scaled
            if bias_gradient is not None:
                bias_gradient[columns] = logit_gradient.T.float() @ gradient
        return hidden_gradient, weight_gradient, bias_gradient, *[None] * 5


def _compute_logprobs_from_logits(
    logits: Float[Tensor, "n vocabulary"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " n"],
    with_entropy: bool,
    needs_gradient: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-probs of the targets, entropies (0 if not `with_entropy`) and log sum exp of each row.

    Overwrites the logits: with d logprob / d logits if `needs_gradient`, else with nothing of use. Elementwise
    operations run in float32, in blocks that fit into a CPU's caches.
    """
    logprobs, entropies, normalizers = torch.zeros(3, len(targets), device=logits.device)
    for rows in iterate_row_slices(len(targets), BLOCK_LOGITS[logits.device.type] // logits.shape[1]):
        float_logits = logits[rows].float() if bias is None else logits[rows].float() + bias
        largest = float_logits.amax(dim=-1, keepdim=True)
        float_logits -= largest
        target = float_logits.gather(-1, targets[rows, None])[:, 0]
        unnormalized_probabilities = float_logits.exp() if with_entropy else float_logits.exp_()
        total = unnormalized_probabilities.sum(dim=-1)
        logprobs[rows] = target - total.log()
        normalizers[rows] = largest[:, 0] + total.log()
        if with_entropy:
            entropies[rows] = total.log() - torch.linalg.vecdot(unnormalized_probabilities, float_logits) / total
        if needs_gradient:
            ones = torch.ones_like(total)[:, None]
            negated = unnormalized_probabilities.mul_(-1 / total[:, None])
            logits[rows] = negated.scatter_add_(1, targets[rows, None], ones)
    return logprobs, entropies, normalizers


def _compute_logit_gradient(
    hidden: Float[Tensor, "n width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " n"],
    normalizers: Float[Tensor, " n"],
    columns: slice,
) -> Float[Tensor, "n columns"]:
    """d logprob / d logits of some columns, from the log sum exp (`normalizers`) of each row."""
    logits = hidden @ weight[columns].T
    column_targets = targets - columns.start
    in_columns = (column_targets >= 0) & (column_targets < logits.shape[1])
    for rows in iterate_row_slices(len(targets), BLOCK_LOGITS[logits.device.type] // logits.shape[1]):
        float_logits = logits[rows].float() if bias is None else logits[rows].float() + bias[columns]
        negated = float_logits.sub_(normalizers[rows, None]).exp_().neg_()
        index = column_targets[rows, None].clamp(0, logits.shape[1] - 1)
        logits[rows] = negated.scatter_add_(1, index, in_columns[rows, None].float())
    return logits


def iterate_row_slices(row_count: int, slice_size: int) -> Iterator[slice]:
    """Yield slices of `slice_size` rows (at least 1) that cover `row_count` rows; the last may be shorter."""
    for start in range(0, row_count, max(1, slice_size)):
        yield slice(start, start + max(1, slice_size))
