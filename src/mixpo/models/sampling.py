"""Sampling: one prefill a prompt, k completions from it, the log-prob of every drawn token kept.

The prefill takes prompts in portions, each one row without padding. Their keys and values are laid under each other, a
row a completion, in tensors allocated once, and drawn tokens are written right behind their prompts: so rows of like
length can be attended to together without the padding of longer ones. Finished rows are dropped from the batch when
there are enough of them to be worth the copy.

A token is drawn by the Gumbel-max trick in its exponential form: the token whose probability is the largest multiple
of its own exponential noise (Gumbel 1954; Maddison et al. 2014). Logits that round otherwise then change the token only
where two tokens are neck and neck, and two models that share noise share most of what they draw. The noise is counter-
based (Salmon et al. 2011), a function of the seed, the prompt, the branch and the position alone, made of integers: so
the batch, its order, the threads, the device and the number of processes change nothing but rounding.

To need noise for a few hundred numbers instead of the whole vocabulary, a block of tokens is drawn first, by its
probability, and then a token of that block.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from mixpo.data.branches import Completions, TokenBatch, pack_prompts, split_into_microbatches
from mixpo.data.errors import InputError
from mixpo.models.language_model import BLOCK_ELEMENTS, LanguageModel, slice_rows

DROP_AT = 0.8
"""Finished rows are dropped when the share of unfinished ones is less."""
PREFILL_TOKENS = {"cpu": 1 << 10, "cuda": 1 << 16}
"""Tokens of prompts that are read at once: what a layer makes of them stays in a CPU's caches; a GPU's is a guess."""
BLOCK = 64
"""Tokens of a block of the vocabulary: one of its blocks is drawn first, then a token of the block."""


@dataclass(frozen=True)
class SampledCompletions(Completions):
    """k completions of each prompt as a model drew them, on the CPU."""

    logprobs: Float[Tensor, "prompts k tokens"]
    """The model's own log-prob of each token in nats, at temperature 1 and not truncated, however it was drawn; 0 where
    the mask is false."""
    ended: Bool[Tensor, "prompts k"]
    """Whether a completion ends with an end token: false where it was cut off."""


@dataclass
class _Rows:
    """What the layers of a cache share: where their rows are read and written."""

    count: int
    capacity: int
    """Tokens that a row has room for."""
    portion: tuple[Tensor, ...] = ()
    """The rows that the prefill is at, [some]; where in its own rows, flattened, their prompts stand, [some, width]."""
    held: int = 0
    """Tokens that the longest row holds; 0 during the prefill."""
    ends: tuple[Int[Tensor, " rows"], ...] = ()
    """Every row, and the place behind what it holds."""


class _Preallocated(DynamicLayer):
    """Keys and values of one layer, a row a completion, in tensors that are long enough for the longest one.

    What comes first is the prefill's, portion by portion: it is copied to the completions' rows, and given back as it
    came. What comes then is a token a row, written right behind what the row holds.
    """

    is_initialized: bool

    def __init__(self, rows: _Rows) -> None:
        super().__init__()
        self.rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.rows.held:
            if not self.is_initialized:
                dtype = value_states.dtype  # rotated keys may be wider than attention is
                self.keys, self.values = (self._room(states, dtype) for states in (key_states, value_states))
                self.is_initialized = True
            self._lay_out(key_states, self.keys)
            self._lay_out(value_states, self.values)
            return key_states, value_states
        rows, ends = self.rows.ends
        self.keys[rows, :, ends] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[rows, :, ends] = value_states[:, :, 0]
        return self.keys[:, :, : self.rows.held + 1], self.values[:, :, : self.rows.held + 1]

    def _room(self, states: Float[Tensor, "rows heads length size"], dtype: torch.dtype) -> Tensor:
        """Zeros: what may not be seen counts nothing times this, which must not be nan."""
        return states.new_zeros(self.rows.count, states.shape[1], self.rows.capacity, states.shape[3], dtype=dtype)

    def _lay_out(self, states: Float[Tensor, "rows heads length size"], room: Tensor) -> None:
        rows, places = self.rows.portion
        found = states.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2)
        room[rows, :, : found.shape[2]] = found.to(room.dtype)

    def get_seq_length(self) -> int:
        return self.rows.held

    def take(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def truncate(
    logits: Float[Tensor, "rows vocabulary"], *, temperature: float, top_p: float, top_k: int
) -> Float[Tensor, "rows vocabulary"]:
    """Probabilities after temperature, then top_k (0 = all), then top_p (1 = all): the smallest set of most probable
    tokens that holds at least `top_p` of the mass."""
    probabilities = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_k:
        least = probabilities.topk(min(top_k, probabilities.shape[-1])).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if top_p < 1.0:
        ordered, order = (probabilities / probabilities.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
        kept = ordered.cumsum(dim=-1) - ordered < top_p
        probabilities = probabilities * torch.zeros_like(kept).scatter(-1, order, kept)
    return probabilities


def draw_tokens(
    probabilities: Float[Tensor, "rows vocabulary"], noise: Float[Tensor, "rows numbers"]
) -> Int[Tensor, " rows"]:
    """One token a row, drawn from unnormalised probabilities with standard exponential noise.

    The first numbers of the noise are for the tokens of the block drawn, the others for the blocks of the vocabulary.
    """
    vocabulary = probabilities.shape[1]
    if vocabulary % BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, -vocabulary % BLOCK))
    blocks = probabilities.unflatten(1, (-1, BLOCK))
    block = (blocks.sum(dim=-1) / noise[:, BLOCK:]).argmax(dim=-1)
    inside = blocks.take_along_dim(block[:, None, None], dim=1)[:, 0]
    tokens: Tensor = block * BLOCK + (inside / noise[:, :BLOCK]).argmax(dim=-1)
    return tokens


def count_noise(vocabulary: int) -> int:
    """Exponential numbers that a draw takes: one a token of a block, one a block of the vocabulary."""
    return BLOCK + -(-vocabulary // BLOCK)


def noise_keys(
    prompt: Sequence[int], *, seed: int, occurrence: int, k: int, max_tokens: int
) -> Int[Tensor, "k max_tokens"]:
    """A 64-bit key for the noise of every token of k completions: SHAKE-128 of all that the noise may depend on.

    `occurrence` tells apart the places where the same prompt stands in one call.
    """
    streams = [
        hashlib.shake_128(" ".join(map(str, (seed, occurrence, branch, *prompt))).encode()).digest(8 * max_tokens)
        for branch in range(k)
    ]
    return torch.from_numpy(np.frombuffer(b"".join(streams), "<i8").astype(np.int64).reshape(k, max_tokens))


def exponential_noise(keys: Int[Tensor, " rows"], count: int) -> Float[Tensor, "rows count"]:
    """Standard exponential numbers, a stream a key, from the same integers on every device.

    The streams are those of SplitMix64 (Steele et al. 2014), but that PyTorch's shifts repeat the sign, which costs one
    bit of 64. The first 52 make a number inside (0, 1), of which minus the logarithm is taken: 1e-16 to 37.
    """
    x = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15)
    x = (x >> 30).bitwise_xor_(x).mul_(_signed(0xBF58476D1CE4E5B9))
    x = (x >> 27).bitwise_xor_(x).mul_(_signed(0x94D049BB133111EB))
    return (x >> 12).double().mul_(2.0**-52).add_(0.5 + 2.0**-53).log_().neg_().float()


def _signed(word: int) -> int:
    """A 64-bit word as PyTorch has it, its highest bit being set."""
    return word - (1 << 64)


def count_occurrences(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How often each prompt stands among those before it, so that equal prompts get completions of their own."""
    counts = Counter[tuple[int, ...]]()
    numbers = []
    for prompt in map(tuple, prompts):
        numbers.append(counts[prompt])
        counts[prompt] += 1
    return numbers


@torch.no_grad()
def sample(
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
) -> SampledCompletions:
    """Draw k completions of at most `max_tokens` tokens for every prompt.

    `token_budget` bounds the tokens in the cache at once; it changes speed and memory only. Tokens that the tokenizer
    does not know are never drawn. `occurrences` are `count_occurrences` of a larger set that the prompts are a portion
    of; their own if not given.

    Raises:
        InputError: The model's logits are not finite.
    """
    occurrences = count_occurrences(prompts) if occurrences is None else occurrences
    tokens = torch.zeros(len(prompts), k, max_tokens, dtype=torch.long)
    logprobs = torch.zeros(len(prompts), k, max_tokens)
    lengths = torch.zeros(len(prompts), k, dtype=torch.long)
    lm.eval()
    capacities = [len(prompt) + max_tokens for prompt in prompts]
    choose = _make_chooser(lm, temperature=temperature, top_p=top_p, top_k=top_k)
    with lm.autocast():
        for rows in split_into_microbatches(capacities, max(1, token_budget // k), padded=True):
            keys = [
                noise_keys(prompts[row], seed=seed, occurrence=occurrences[row], k=k, max_tokens=max_tokens)
                for row in rows
            ]
            part = _sample_batch(lm, [prompts[row] for row in rows], torch.stack(keys).to(lm.device), choose)
            tokens[rows], logprobs[rows], lengths[rows] = (x.unflatten(0, (-1, k)).cpu() for x in part)
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[..., None]
    last = tokens.gather(-1, lengths[..., None] - 1)[..., 0]
    ended = torch.isin(last, torch.tensor(sorted(lm.end_tokens)))
    return SampledCompletions(tokens[..., :longest] * mask, mask, logprobs[..., :longest] * mask, ended)


def _make_chooser(
    lm: LanguageModel, *, temperature: float, top_p: float, top_k: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function that draws tokens from logits, and returns them with the model's own log-probs."""
    unused = torch.tensor(lm.unused_tokens, device=lm.device)
    truncates = temperature != 1.0 or top_p != 1.0 or top_k != 0 or len(unused) > 0

    def choose(
        logits: Float[Tensor, "rows vocabulary"], keys: Int[Tensor, " rows"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        noise = exponential_noise(keys, count_noise(logits.shape[1]))
        tokens, logprobs = list[Tensor](), list[Tensor]()
        for rows in slice_rows(len(logits), BLOCK_ELEMENTS[logits.device.type] // logits.shape[1]):
            wide = logits[rows].float()
            largest = wide.amax(dim=-1, keepdim=True)
            probabilities = (wide - largest).exp_()
            total = probabilities.sum(dim=-1)
            if truncates:
                known = wide.index_fill(1, unused, float("-inf")) if len(unused) else wide
                probabilities = truncate(known, temperature=temperature, top_p=top_p, top_k=top_k)
            tokens.append(draw_tokens(probabilities, noise[rows]))
            logprobs.append((wide.gather(-1, tokens[-1][:, None]) - largest)[:, 0] - total.log())
        return torch.cat(tokens), torch.cat(logprobs)

    return choose


def _sample_batch(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    keys: Int[Tensor, "prompts k tokens"],
    choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Int[Tensor, "rows tokens"], Float[Tensor, "rows tokens"], Int[Tensor, " rows"]]:
    """Draw k completions of each prompt, a row each: tokens, log-probs, lengths."""
    device = lm.device
    count, k, max_tokens = keys.shape
    end_tokens = torch.tensor(sorted(lm.end_tokens), device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(k)
    shared = _Rows(count * k, max(map(len, prompts)) + max_tokens)
    cache = Cache(layer_class_to_replicate=partial(_Preallocated, shared))
    logits = _prefill(lm, prompts, k, shared, cache)
    keys = keys.flatten(0, 1)
    tokens_out = torch.zeros(count * k, max_tokens, dtype=torch.long, device=device)
    logprobs_out = torch.zeros(count * k, max_tokens, device=device)
    ended_at = torch.full((count * k,), max_tokens, device=device)
    active, prompted = torch.arange(count * k, device=device), lengths.tolist()
    for step in range(max_tokens):
        tokens, logprobs = choose(logits, keys[active, step])
        tokens_out[active, step], logprobs_out[active, step] = tokens, logprobs
        ended = torch.isin(tokens, end_tokens)
        ended_at[active] = torch.where(ended, ended_at[active].clamp(max=step + 1), ended_at[active])
        going = ended_at[active] > step + 1
        left = int(going.sum())
        if left == 0 or step == max_tokens - 1:
            break
        if left < DROP_AT * len(active):
            kept = going.nonzero()[:, 0]
            active, tokens = active[kept], tokens[kept]
            prompted = lengths[active].tolist()
            for layer in cache.layers:
                layer.take(kept)
        position = lengths[active] + step
        shared.held, shared.ends = max(prompted) + step, (torch.arange(len(active), device=device), position)
        batch = TokenBatch(tokens[:, None], position[:, None], [length + step + 1 for length in prompted])
        logits = lm(batch, "logits", cache=cache)

    if bool(logprobs_out.isnan().any()):
        raise InputError(
            "sampling: found logits that are nan or infinite; expected finite ones; the model's weights are damaged or "
            "its training diverged: look at its loss, and lower the learning rate"
        )
    return tokens_out, logprobs_out, ended_at


def _prefill(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], k: int, shared: _Rows, cache: Cache
) -> Float[Tensor, "rows vocabulary"]:
    """Fill the cache with every prompt, and compute the logits of the first token, a row a completion."""
    found, order = [], []
    for part in split_into_microbatches([len(prompt) for prompt in prompts], PREFILL_TOKENS[lm.device.type]):
        batch = pack_prompts([prompts[row] for row in part], share_row=lm.shares_prompts).to(lm.device)
        rows = torch.tensor([row * k + branch for row in part for branch in range(k)], device=lm.device)
        shared.portion = (rows, batch.places.repeat_interleave(k, dim=0))
        found.append(lm(batch, "logits", cache=cache).repeat_interleave(k, dim=0))
        order.append(rows)
    return torch.cat(found)[torch.cat(order).argsort()]
