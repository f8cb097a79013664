"""Sampling of completions: one prefill a prompt, k completions from it, with the log-prob of every token.

The prefill computes several prompts as one row without padding. The key-value cache has one row a completion,
allocated once, and each new token is written right behind its row's last one, so that rows of similar length are
attended to together without the padding of longer ones. Finished rows are removed from the batch when enough have
finished.

A token is drawn by the exponential form of the Gumbel-max trick: argmax of probability / exponential noise (Gumbel
1954; Maddison et al. 2014). A difference in rounding then changes a token only if two tokens are almost tied. The
noise is counter-based (Salmon et al. 2011): a function, in integers, of the seed, the prompt, the branch and the
position. Batches, their order, threads, devices and processes thus change nothing but rounding.

A block of the vocabulary is drawn first, then a token of that block, which takes a few hundred noise values instead of
one for every token.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from mixpo.data.branches import Completions, DecodingBatch, pack_prompts, split_into_microbatches
from mixpo.data.errors import InputError
from mixpo.models.adapters import join_adapters
from mixpo.models.language_model import LanguageModel
from mixpo.models.logprobs import BLOCK_LOGITS, iterate_row_slices

MIN_ACTIVE_SHARE = 0.8
"""Share of unfinished rows below which finished ones are removed from the batch."""
PREFILL_TOKENS = {"cpu": 1 << 10, "cuda": 1 << 16}
"""Prompt tokens of one prefill: few on a CPU, so that activations stay in its caches; not measured on a GPU."""
BLOCK_TOKENS = 64
"""Tokens of a block of the vocabulary."""
FIXED_SHAPE_STEPS = 64
"""Decoding steps for which shapes are fixed at a time: keys are read for so many tokens ahead."""


@dataclass(frozen=True)
class SampledCompletions(Completions):
    """k completions of each prompt sampled from a model, with log-probs, on the CPU."""

    logprobs: Float[Tensor, "prompts k tokens"]
    """Log-probs in nats, at temperature 1 and not truncated, whatever the sampling settings; 0 where the mask is false.
    """
    ended: Bool[Tensor, "prompts k"]
    """True if a completion ends with an end token, False if it was cut off."""

    @classmethod
    def from_lengths(
        cls,
        tokens: Int[Tensor, "prompts k most"],
        logprobs: Float[Tensor, "prompts k most"],
        lengths: Int[Tensor, "prompts k"],
        end_tokens: Iterable[int],
    ) -> Self:
        """Make it of padded tokens and log-probs, cut to the longest completion, with zeros behind every completion."""
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[..., None]
        last = tokens.gather(-1, lengths[..., None] - 1)[..., 0]
        ended = torch.isin(last, torch.tensor(sorted(end_tokens)))
        return cls(tokens[..., :longest] * mask, mask, logprobs[..., :longest] * mask, ended)


@dataclass
class _CacheRowIndices:
    """Row and position indices for reading and writing a key-value cache, shared by its layers."""

    count: int
    capacity: int
    """Most tokens of a row."""
    prefill_index: tuple[Tensor, ...] = ()
    """Cache rows of a prefill's completions, [n], and the indices of their prompts' tokens in the prefill, [n, length].
    """
    length: int = 0
    """Tokens in the longest row; 0 during the prefill."""
    write_index: tuple[Int[Tensor, " rows"], ...] = ()
    """Index of each row, and of the position after its last token."""


class _PreallocatedCacheLayer(DynamicLayer):
    """Key-value cache of one layer, one row a completion, allocated once for the longest row.

    A prefill is copied to the rows of its completions and returned unchanged. Later, each call appends one token a row.
    """

    is_initialized: bool

    def __init__(self, rows: _CacheRowIndices) -> None:
        super().__init__()
        self.rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values to the cache, and return those that the new queries attend to."""
        if not self.rows.length:
            if not self.is_initialized:
                dtype = value_states.dtype  # rotated keys may be wider than attention is
                self.keys, self.values = (self._allocate_cache(states, dtype) for states in (key_states, value_states))
                self.is_initialized = True
            self._write_prompts(key_states, self.keys)
            self._write_prompts(value_states, self.values)
            return key_states, value_states
        rows, positions = self.rows.write_index
        self.keys[rows, :, positions] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[rows, :, positions] = value_states[:, :, 0]
        return self.keys[:, :, : self.rows.length + 1], self.values[:, :, : self.rows.length + 1]

    def _allocate_cache(self, states: Float[Tensor, "rows heads length size"], dtype: torch.dtype) -> Tensor:
        """A cache tensor of zeros for keys or values: masked values are multiplied by 0, so they must not be nan."""
        return states.new_zeros(self.rows.count, states.shape[1], self.rows.capacity, states.shape[3], dtype=dtype)

    def _write_prompts(self, states: Float[Tensor, "rows heads length size"], cache: Tensor) -> None:
        """Copy the prompts of a prefill into the cache rows of their completions, in place."""
        rows, positions = self.rows.prefill_index
        prompts = states.transpose(1, 2).flatten(0, 1)[positions].transpose(1, 2)
        cache[rows, :, : prompts.shape[2]] = prompts.to(cache.dtype)

    def get_seq_length(self) -> int:
        """Number of cached tokens in the longest row; 0 during the prefill."""
        return self.rows.length

    def select_cache_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep only these rows of the cache, in this order."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class _DecodingSteps:
    """The decoding steps of a batch: the logits of each row's next token, from its newest token.

    With fixed shapes every row reads keys for the steps ahead, masked until they are written, so that all kernels of a
    step are the same for `FIXED_SHAPE_STEPS` steps, or until rows are removed. On a GPU they are recorded as a CUDA
    graph and replayed, which takes the time of the kernels without that of starting each of them; not run on one yet.
    """

    def __init__(self, lm: LanguageModel, cache: Cache, cache_rows: _CacheRowIndices, *, fixed_shapes: bool) -> None:
        self.lm, self.cache, self.cache_rows, self.fixed_shapes = lm, cache, cache_rows, fixed_shapes
        self.steps_left = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def compute_logits(
        self, tokens: Int[Tensor, " rows"], position: Int[Tensor, " rows"], token_counts: Sequence[int]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Logits after each row's newest token; `token_counts` are those of the rows, the newest token included."""
        if not self.steps_left or len(tokens) != len(self.tokens):
            self.steps_left = FIXED_SHAPE_STEPS if self.fixed_shapes else 1
            self._set_up_steps(tokens, position, token_counts)
            self.logits = self._compute_step()
            if self.fixed_shapes and self.lm.device.type == "cuda":
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.logits = self._compute_step()
        else:
            self.tokens.copy_(tokens)
            self.position.copy_(position)
            if self.graph is None:
                self.logits = self._compute_step()
        if self.graph is not None:
            self.graph.replay()
        self.steps_left -= 1
        return self.logits

    def _set_up_steps(self, tokens: Tensor, position: Tensor, token_counts: Sequence[int]) -> None:
        """Make the inputs of the next steps, whose values change in place, and their shapes, which do not."""
        self.tokens, self.position = tokens.clone(), position.clone()
        most_counts = [min(count + self.steps_left - 1, self.cache_rows.capacity) for count in token_counts]
        self.cache_rows.length = max(most_counts) - 1
        self.cache_rows.write_index = torch.arange(len(tokens), device=tokens.device), self.position
        self.batch = DecodingBatch(self.tokens[:, None], self.position[:, None], most_counts)

    def _compute_step(self) -> Tensor:
        """Compute one step from the current inputs, writing their keys and values to the cache."""
        return self.lm(self.batch, "logits", cache=self.cache)


def compute_truncated_probabilities(
    logits: Float[Tensor, "rows vocabulary"], *, temperature: float, top_p: float, top_k: int
) -> Float[Tensor, "rows vocabulary"]:
    """Unnormalized probabilities after temperature, then top_k (0 keeps all tokens), then top_p (1 keeps all)."""
    probabilities = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_k:
        least = probabilities.topk(min(top_k, probabilities.shape[-1])).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if top_p < 1.0:
        ordered, order = (probabilities / probabilities.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
        in_top_p = ordered.cumsum(dim=-1) - ordered < top_p
        probabilities = probabilities * torch.zeros_like(in_top_p).scatter(-1, order, in_top_p)
    return probabilities


def draw_tokens(
    probabilities: Float[Tensor, "rows vocabulary"], noise: Float[Tensor, "rows numbers"]
) -> Int[Tensor, " rows"]:
    """Draw one token id a row from unnormalized probabilities, by given standard exponential noise.

    The first `BLOCK_TOKENS` noise values are for the tokens of the drawn block, the others for the blocks.
    """
    vocabulary = probabilities.shape[1]
    if vocabulary % BLOCK_TOKENS:
        probabilities = torch.nn.functional.pad(probabilities, (0, -vocabulary % BLOCK_TOKENS))
    blocks = probabilities.unflatten(1, (-1, BLOCK_TOKENS))
    block = (blocks.sum(dim=-1) / noise[:, BLOCK_TOKENS:]).argmax(dim=-1)
    inside = blocks.take_along_dim(block[:, None, None], dim=1)[:, 0]
    tokens: Tensor = block * BLOCK_TOKENS + (inside / noise[:, :BLOCK_TOKENS]).argmax(dim=-1)
    return tokens


def count_noise_values(vocabulary_size: int) -> int:
    """Count the noise values that one draw takes: one a token of a vocabulary block, one a block."""
    return BLOCK_TOKENS + -(-vocabulary_size // BLOCK_TOKENS)


def make_noise_keys(
    prompt: Sequence[int], *, seed: int, occurrence: int, k: int, max_tokens: int
) -> Int[Tensor, "k max_tokens"]:
    """A 64-bit noise key a token of k completions: SHAKE-128 of seed, prompt, branch and earlier equal prompts."""
    streams = [
        hashlib.shake_128(" ".join(map(str, (seed, occurrence, branch, *prompt))).encode()).digest(8 * max_tokens)
        for branch in range(k)
    ]
    return torch.from_numpy(np.frombuffer(b"".join(streams), "<i8").astype(np.int64).reshape(k, max_tokens))


def make_exponential_noise(keys: Int[Tensor, " rows"], count: int) -> Float[Tensor, "rows count"]:
    """`count` standard exponential random numbers from each key, from the same integers on every device.

    Integers are SplitMix64's (Steele et al. 2014), except that PyTorch's shifts repeat the sign, which costs one bit of
    64. The upper 52 bits make a number u in (0, 1); the result is -log(u), 1e-16 to 37.
    """
    x = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * _convert_to_signed(0x9E3779B97F4A7C15)
    x = (x >> 30).bitwise_xor_(x).mul_(_convert_to_signed(0xBF58476D1CE4E5B9))
    x = (x >> 27).bitwise_xor_(x).mul_(_convert_to_signed(0x94D049BB133111EB))
    return (x >> 12).double().mul_(2.0**-52).add_(0.5 + 2.0**-53).log_().neg_().float()


def _convert_to_signed(word: int) -> int:
    """Convert a 64-bit integer whose highest bit is set to the signed (negative) one that PyTorch has."""
    return word - (1 << 64)


def count_earlier_occurrences(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt, the count of equal prompts before it; it makes equal prompts get different completions."""
    counters: defaultdict[tuple[int, ...], itertools.count[int]] = defaultdict(itertools.count)
    return [next(counters[tuple(prompt)]) for prompt in prompts]


def count_cacheable_tokens(lm: LanguageModel, cache_bytes: int) -> int:
    """Number of tokens whose keys and values, of all layers, fit into some bytes; at least 1."""
    config = lm.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = (getattr(config, "qk_head_dim", head_size), getattr(config, "v_head_dim", None) or head_size)
    element_bytes = 2 if lm.precision == "bfloat16" else 4
    token_bytes: int = config.num_hidden_layers * heads * sum(sizes) * element_bytes
    return max(1, cache_bytes // token_bytes)


@torch.no_grad()
def sample_completions(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    k: int,
    max_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    token_budget: int = 16_384,
    occurrences: Sequence[int] | None = None,
    fixed_shapes: bool = False,
) -> SampledCompletions:
    """Sample k completions of at most `max_tokens` tokens for every prompt, in the prompts' order.

    `token_budget` bounds the tokens in the key-value cache and changes speed and memory only. Tokens that the tokenizer
    does not have are never drawn. `occurrences` are `count_earlier_occurrences` of a larger set if the prompts are a
    part of one, by default of the prompts themselves. `fixed_shapes` makes decoding steps that a GPU records and
    replays.

    Raises:
        InputError: The model's logits are not finite.
    """
    occurrences = count_earlier_occurrences(prompts) if occurrences is None else occurrences
    tokens = torch.zeros(len(prompts), k, max_tokens, dtype=torch.long)
    logprobs = torch.zeros(len(prompts), k, max_tokens)
    lengths = torch.zeros(len(prompts), k, dtype=torch.long)
    lm.eval()
    capacities = [len(prompt) + max_tokens for prompt in prompts]
    draw_tokens_with_logprobs = _make_draw_function(lm, temperature=temperature, top_p=top_p, top_k=top_k)
    with lm.autocast(), join_adapters(lm.network, lm.adapters):
        for rows in split_into_microbatches(capacities, max(1, token_budget // k), count_padding=True):
            keys = [
                make_noise_keys(prompts[row], seed=seed, occurrence=occurrences[row], k=k, max_tokens=max_tokens)
                for row in rows
            ]
            part = _sample_batch(
                lm,
                [prompts[row] for row in rows],
                torch.stack(keys).to(lm.device),
                draw_tokens_with_logprobs,
                fixed_shapes=fixed_shapes,
            )
            tokens[rows], logprobs[rows], lengths[rows] = (x.unflatten(0, (-1, k)).cpu() for x in part)
    return SampledCompletions.from_lengths(tokens, logprobs, lengths, lm.end_tokens)


def _make_draw_function(
    lm: LanguageModel, *, temperature: float, top_p: float, top_k: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Make a function that draws a token a row from logits and noise keys, and returns tokens and log-probs."""
    unused = torch.tensor(lm.unused_tokens, device=lm.device)
    truncates = temperature != 1.0 or top_p != 1.0 or top_k != 0 or len(unused) > 0

    def draw_tokens_with_logprobs(
        logits: Float[Tensor, "rows vocabulary"], keys: Int[Tensor, " rows"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """One token id a row, and its log-prob in nats at temperature 1 over the whole vocabulary."""
        noise = make_exponential_noise(keys, count_noise_values(logits.shape[1]))
        tokens, logprobs = list[Tensor](), list[Tensor]()
        for rows in iterate_row_slices(len(logits), BLOCK_LOGITS[logits.device.type] // logits.shape[1]):
            float_logits = logits[rows].float()
            largest = float_logits.amax(dim=-1, keepdim=True)
            probabilities = (float_logits - largest).exp_()
            total = probabilities.sum(dim=-1)
            if truncates:
                allowed = float_logits.index_fill(1, unused, float("-inf")) if len(unused) else float_logits
                probabilities = compute_truncated_probabilities(
                    allowed, temperature=temperature, top_p=top_p, top_k=top_k
                )
            tokens.append(draw_tokens(probabilities, noise[rows]))
            logprobs.append((float_logits.gather(-1, tokens[-1][:, None]) - largest)[:, 0] - total.log())
        return torch.cat(tokens), torch.cat(logprobs)

    return draw_tokens_with_logprobs


def _sample_batch(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    noise_keys: Int[Tensor, "prompts k tokens"],
    draw_tokens_with_logprobs: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    fixed_shapes: bool,
) -> tuple[Int[Tensor, "rows tokens"], Float[Tensor, "rows tokens"], Int[Tensor, " rows"]]:
    """Sample k completions of each prompt of one batch; returns tokens, log-probs and lengths, one row a completion."""
    device = lm.device
    count, k, max_tokens = noise_keys.shape
    end_tokens = torch.tensor(sorted(lm.end_tokens), device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(k)
    cache_rows = _CacheRowIndices(count * k, max(map(len, prompts)) + max_tokens)
    cache = Cache(layer_class_to_replicate=partial(_PreallocatedCacheLayer, cache_rows))
    logits = _prefill_cache(lm, prompts, k, cache_rows, cache)
    steps = _DecodingSteps(lm, cache, cache_rows, fixed_shapes=fixed_shapes)
    noise_keys = noise_keys.flatten(0, 1)
    tokens_out = torch.zeros(count * k, max_tokens, dtype=torch.long, device=device)
    logprobs_out = torch.zeros(count * k, max_tokens, device=device)
    ended_at = torch.full((count * k,), max_tokens, device=device)
    active, prompt_lengths = torch.arange(count * k, device=device), lengths.tolist()
    for step in range(max_tokens):
        tokens, logprobs = draw_tokens_with_logprobs(logits, noise_keys[active, step])
        tokens_out[active, step], logprobs_out[active, step] = tokens, logprobs
        ended = torch.isin(tokens, end_tokens)
        ended_at[active] = torch.where(ended, ended_at[active].clamp(max=step + 1), ended_at[active])
        unfinished = ended_at[active] > step + 1
        remaining = int(unfinished.sum())
        if remaining == 0 or step == max_tokens - 1:
            break
        if remaining < MIN_ACTIVE_SHARE * len(active):
            rows = unfinished.nonzero()[:, 0]
            active, tokens = active[rows], tokens[rows]
            prompt_lengths = lengths[active].tolist()
            for layer in cache.layers:
                layer.select_cache_rows(rows)
        token_counts = [length + step + 1 for length in prompt_lengths]
        logits = steps.compute_logits(tokens, lengths[active] + step, token_counts)

    refuse_non_finite_logprobs(logprobs_out)
    return tokens_out, logprobs_out, ended_at


def refuse_non_finite_logprobs(logprobs: Tensor) -> None:
    """Raise `InputError` if one of a model's log-probs is undefined."""
    if bool(logprobs.isnan().any()):
        raise InputError(
            "sampling: found logits that are nan or infinite; expected finite ones; the model's weights are damaged or "
            "its training diverged: look at its loss, and lower the learning rate"
        )


def _prefill_cache(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], k: int, cache_rows: _CacheRowIndices, cache: Cache
) -> Float[Tensor, "rows vocabulary"]:
    """Write every prompt to the cache, and return the logits of the first token, one row a completion."""
    logits, cache_order = [], []
    for part in split_into_microbatches([len(prompt) for prompt in prompts], PREFILL_TOKENS[lm.device.type]):
        batch = pack_prompts([prompts[row] for row in part], share_row=lm.shares_prompts).to(lm.device)
        rows = torch.tensor([row * k + branch for row in part for branch in range(k)], device=lm.device)
        cache_rows.prefill_index = (rows, batch.token_index.repeat_interleave(k, dim=0))
        logits.append(lm(batch, "logits", cache=cache).repeat_interleave(k, dim=0))
        cache_order.append(rows)
    return torch.cat(logits)[torch.cat(cache_order).argsort()]
