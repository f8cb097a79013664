"""The language model that all stages use: log-probs, scores and values of branch batches, logits for sampling."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from mixpo.data.branches import BranchBatch, PromptBatch, TokenBatch
from mixpo.data.tokens import decode_completion
from mixpo.models.attention import NAME as ATTENTION
from mixpo.models.attention import branch_attention, decoding_attention

Precision = Literal["float32", "bfloat16"]
Output = Literal["states", "logprobs", "entropies", "values", "scores", "logits"]
Batch = BranchBatch | PromptBatch | TokenBatch

CHUNK_ELEMENTS = 1 << 25
"""Logits held at once: 128 MiB in float32."""
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": CHUNK_ELEMENTS}
"""Logits read at once, in float32: 1 MiB on a CPU; a GPU is given all that are there."""
KEPT_ELEMENTS = 1 << 27
"""Gradients of logits kept for the backward pass: 256 MiB in bfloat16."""


class LanguageModel(nn.Module):
    """A transformers model with its tokenizer. The model is a causal language model, or has a scalar `score` head.

    Every pass through the weights is a call of this module, so that hooks (sharding, compilation, checkpointing of
    activations) see all of them.
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
            model: The network; its attention is replaced by that of branch batches.
            tokenizer: Its tokenizer.
            end_token: The token that a completion is taught to end with.
            shares_prompts: Whether branches of one row see exactly what they would see alone.
            precision: What matrix products are computed in.
            dtype: Type of the weights in the folder that they came from, and in those that they are saved to.
            folder: Where the weights were read; None where they are not from a folder.
            end_tokens: Tokens beside `end_token` that end a completion when they are sampled.
            logit_scale: What the output head's product is multiplied by (Granite, Cohere).
            unused_tokens: Ids that the tokenizer has no token for (a padded vocabulary). Never sampled; log-probs are
                of all ids still.
        """
        super().__init__()
        model.set_attn_implementation(ATTENTION)
        self.model = model
        self.value_head: nn.Module | None = None
        """Reads values from the model's states; None where values are read by the model's own `score` head."""
        self.tokenizer = tokenizer
        self.end_token = end_token
        self.shares_prompts = shares_prompts
        self.precision = precision
        self.dtype = dtype
        self.folder = folder
        self.end_tokens = end_tokens | {end_token}
        self.logit_scale = logit_scale
        self.unused_tokens = unused_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def read_text(self, completion: Sequence[int]) -> str:
        """Decode a completion, without the token that ended it and without special tokens."""
        ended = [*completion[:-1], self.end_token] if self.has_ended(completion) else completion
        return decode_completion(self.tokenizer, ended)

    def has_ended(self, completion: Sequence[int]) -> bool:
        """Whether a completion's last token ends it: false where it was cut off."""
        return completion[-1] in self.end_tokens

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the model's precision: matrix products in bfloat16, weights in float32."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16", cache_enabled=True
        )

    def train(self, mode: bool = True) -> Self:
        """Make the model ready for an update: as in evaluation, with the adapters' own dropout alone.

        A base model's dropout would make the ratio to the sampling policy other than 1 before the first update.
        """
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
        """Compute outputs of a batch: a tensor if one is asked for, else a tuple in the order asked for.

        - `states` [rows * length, width]: the last hidden state at every place of the batch's rows, flattened.
        - `logprobs` [prompts, k, tokens]: log-probs of the completion tokens in nats, at temperature 1.
        - `entropies` [prompts, k, tokens]: entropies, in nats, of the distributions that they were drawn from, without
          a gradient.
        - `values` [prompts, k, tokens]: values of the states in which the completion tokens are chosen, in reward
          units: read where each token is predicted.
        - `scores` [prompts, k]: the reward model's score of every completion, read at its last token.
        - `logits` [prompts, vocabulary]: of the token after each prompt, or after the newest token.

        Per-token outputs are 0 where the batch's mask is false. Logits are computed only where a token is predicted,
        in chunks; scalar heads compute in float32. `cache` gets keys and values. `detach_values` keeps the gradient of
        the values from the model's states.
        """
        states = self._compute_states(batch, cache)
        computed: dict[str, Tensor] = {"states": states}
        if isinstance(batch, BranchBatch):
            if "logprobs" in outputs or "entropies" in outputs:
                predictions = self._compute_logprobs(states, batch, with_entropy="entropies" in outputs)
                computed["logprobs"], computed["entropies"] = predictions
            if "values" in outputs:
                head = self.model.score if self.value_head is None else self.value_head
                read = states.detach() if detach_values else states
                computed["values"] = head(read[batch.source].float())[..., 0].masked_fill(~batch.mask, 0.0)
            if "scores" in outputs:
                computed["scores"] = self.model.score(states[batch.last].float())[..., 0]
        elif "logits" in outputs:
            with self.autocast():
                computed["logits"] = self.model.get_output_embeddings()(states[batch.last] * self.logit_scale)
        found = tuple(computed[output] for output in outputs)
        return found[0] if len(found) == 1 else found

    def _compute_states(self, batch: Batch, cache: Cache | None) -> Float[Tensor, "places width"]:
        mask: Tensor | dict[str, Tensor] | None
        if isinstance(batch, TokenBatch):
            mask, attention = self._mask_of_new_tokens(batch), decoding_attention(batch.lengths, self.device)
        else:
            unread = torch.empty(1, 1, 1, 1, device=self.device)  # of four dimensions, so that no mask is made instead
            mask = make_layer_masks(self.model, lambda _: unread) if batch.spans else None
            attention = branch_attention(batch.spans, self.device)
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

    def _mask_of_new_tokens(self, batch: TokenBatch) -> Tensor | dict[str, Tensor]:
        """The mask of one new token a row over all keys, with the model's sliding window where it has one."""
        distance = batch.position_ids - torch.arange(max(batch.lengths), device=self.device)

        def attends(window: int | None = None) -> Tensor:
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            return visible[:, None, None]

        return make_layer_masks(self.model, attends)

    def _compute_logprobs(
        self, states: Float[Tensor, "places width"], batch: BranchBatch, *, with_entropy: bool
    ) -> tuple[Float[Tensor, "prompts k tokens"], Float[Tensor, "prompts k tokens"]]:
        head = self.model.get_output_embeddings()
        logprobs, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            states[batch.source[batch.mask]] * self.logit_scale,
            head.weight,
            head.bias,
            batch.completions[batch.mask],
            torch.bfloat16 if self.precision == "bfloat16" else torch.float32,
            with_entropy,
            torch.is_grad_enabled(),
        )
        empty = torch.zeros(batch.mask.shape, device=states.device)
        return empty.masked_scatter(batch.mask, logprobs), empty.masked_scatter(batch.mask, entropies)


def iterate_matrix_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that multiply by a weight matrix, adapters and heads among them: linear layers, and GPT-2's."""
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield module


def make_layer_masks(
    model: PreTrainedModel, attends: Callable[[int | None], Bool[Tensor, "rows 1 queries keys"]]
) -> Tensor | dict[str, Tensor]:
    """An attention mask in the form the model takes: with its sliding window, one mask a layer type where they differ.

    `attends` makes the mask for a window, or for none.
    """
    config = model.config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    types: set[str] = set(getattr(config, "layer_types", None) or ())
    if window is None or types == {"full_attention"} or getattr(config, "use_sliding_window", True) is False:
        return attends(None)
    if types in ({"sliding_attention"}, set()):
        return attends(window)
    return {"full_attention": attends(None), "sliding_attention": attends(window)}


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight^T + bias)[target] a row, in chunks: a whole batch's logits are never held at once.

    d logprob / d logits = onehot(target) - softmax, written over the logits. What follows from it for `hidden` needs no
    gradient from above but a factor a row, so the forward pass computes it while a chunk of rows' logits are there. The
    weights' gradient needs all rows' d logits again: kept where they are few, made again where they are many, in chunks
    of columns, each of which is a part of that gradient and added to nothing.
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
        learning: bool,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        narrow, narrow_weight = hidden.to(dtype), weight.to(dtype)
        logprobs, entropies, normalizers = torch.zeros(3, len(targets), device=hidden.device)
        directions = torch.empty_like(narrow) if learning else None
        weights_learn = learning and any(ctx.needs_input_grad[1:3])
        few = len(targets) * len(weight) <= KEPT_ELEMENTS
        kept = narrow.new_empty(len(targets), len(weight)) if weights_learn and few else None
        for rows in slice_rows(len(targets), CHUNK_ELEMENTS // len(weight)):
            logits = torch.mm(narrow[rows], narrow_weight.T, out=None if kept is None else kept[rows])
            logprobs[rows], entropies[rows], normalizers[rows] = _read(
                logits, bias, targets[rows], with_entropy, learning
            )
            if directions is not None:
                directions[rows] = logits @ narrow_weight
        ctx.save_for_backward(narrow, narrow_weight, bias, targets, normalizers, directions, kept)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, " n"], _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers, directions, kept = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        wanted = ctx.needs_input_grad[:3]
        of_hidden = (directions * gradient[:, None]).to(hidden_dtype)
        of_weight = torch.empty_like(weight, dtype=weight_dtype) if wanted[1] else None
        of_bias = torch.empty_like(bias) if wanted[2] else None
        if of_weight is None and of_bias is None:
            return of_hidden, *[None] * 7
        scaled = (hidden * gradient[:, None]).to(hidden.dtype)
        for columns in slice_rows(len(weight), CHUNK_ELEMENTS // max(1, *hidden.shape)):
            if kept is None:
                of_logits = _gradient_of_logits(hidden, weight, bias, targets, normalizers, columns)
            else:
                of_logits = kept[:, columns]
            if of_weight is not None:
                of_weight[columns] = of_logits.T @ scaled
            if of_bias is not None:
                of_bias[columns] = of_logits.T.float() @ gradient
        return of_hidden, of_weight, of_bias, *[None] * 5


def _read(
    logits: Float[Tensor, "n vocabulary"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " n"],
    with_entropy: bool,
    learning: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-probs of the targets, entropies or 0, and log sum exp.

    The logits are lost, if `learning` to d logprob / d logits.

    What is done to them element by element is done in float32, in blocks that a CPU's caches hold.
    """
    logprobs, entropies, normalizers = torch.zeros(3, len(targets), device=logits.device)
    for rows in slice_rows(len(targets), BLOCK_ELEMENTS[logits.device.type] // logits.shape[1]):
        wide = logits[rows].float() if bias is None else logits[rows].float() + bias
        largest = wide.amax(dim=-1, keepdim=True)
        wide -= largest
        target = wide.gather(-1, targets[rows, None])[:, 0]
        odds = wide.exp() if with_entropy else wide.exp_()
        total = odds.sum(dim=-1)
        logprobs[rows] = target - total.log()
        normalizers[rows] = largest[:, 0] + total.log()
        if with_entropy:
            entropies[rows] = total.log() - torch.linalg.vecdot(odds, wide) / total
        if learning:
            ones = torch.ones_like(total)[:, None]
            logits[rows] = odds.mul_(-1 / total[:, None]).scatter_add_(1, targets[rows, None], ones)
    return logprobs, entropies, normalizers


def _gradient_of_logits(
    hidden: Float[Tensor, "n width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " n"],
    normalizers: Float[Tensor, " n"],
    columns: slice,
) -> Float[Tensor, "n columns"]:
    """d logprob / d logits of some columns, from every row's log sum exp."""
    logits = hidden @ weight[columns].T
    places = targets - columns.start
    here = (places >= 0) & (places < logits.shape[1])
    for rows in slice_rows(len(targets), BLOCK_ELEMENTS[logits.device.type] // logits.shape[1]):
        wide = logits[rows].float() if bias is None else logits[rows].float() + bias[columns]
        odds = wide.sub_(normalizers[rows, None]).exp_().neg_()
        logits[rows] = odds.scatter_add_(1, places[rows, None].clamp(0, logits.shape[1] - 1), here[rows, None].float())
    return logits


def slice_rows(count: int, size: int) -> Iterator[slice]:
    """Slices of `size`, at least 1, that cover `count`; the last one may be smaller."""
    for start in range(0, count, max(1, size)):
        yield slice(start, start + max(1, size))
