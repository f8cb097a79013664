"""The interface through which every stage samples completions, and its implementation in this process."""

from collections.abc import Sequence
from typing import Literal, NotRequired, Protocol, TypedDict, Unpack

from mixpo.models.language_model import LanguageModel
from mixpo.models.sampling import SampledCompletions, count_cacheable_tokens, sample_completions

SamplerName = Literal["local", "vllm"]
"""Engines that draw completions: in this process, or a vLLM server (`mixpo.models.vllm_sampler`)."""


class SamplingOptions(TypedDict):
    """Keyword options of `draw`; those left out have the defaults of `sample_completions`."""

    k: int
    max_tokens: int
    seed: int
    temperature: NotRequired[float]
    top_p: NotRequired[float]
    top_k: NotRequired[int]
    occurrences: NotRequired[Sequence[int] | None]
    """Numbers that distinguish equal prompts: `count_earlier_occurrences` of a larger set if the prompts are a part of
    one, by default of the prompts themselves."""


class Sampler(Protocol):
    """Protocol of an engine that samples completions from a policy. `tests/test_samplers.py` tests what it promises.

    A policy's network, `policy.model`, has mixpo's attention in it, and adapters, of which those in `policy.adapters`
    are the policy's: `write_adapter_folder` writes their sum, `write_current_weights` a policy without adapters.
    `policy.autocast()` sets its precision. Its published `generation_config` is not to be drawn with.
    """

    def load_policy(self, policy: LanguageModel) -> None:
        """Copy or reference the policy's current weights, from which the next completions are sampled."""

    def draw(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> SampledCompletions:
        """Sample k completions of at most `max_tokens` tokens for every prompt, in the prompts' order.

        There may be any number of prompts; the sampler bounds its own memory. A token is drawn after temperature, then
        top_k (0 keeps all), then top_p, and never from `policy.unused_tokens`. Any of `policy.end_tokens` ends a
        completion and is its last token. The log-probs are the policy's own over its whole vocabulary, at temperature 1
        and not truncated, within 0.001 nats a token in float32 and 0.1 in bfloat16 of a forward pass.

        A stage calls this once a portion, with one seed (any integer): random numbers must depend on seed, prompt,
        occurrence, branch and position, and on nothing else, so that portions and resumed work change nothing.

        Raises:
            InputError: The model's logits are not finite.
        """

    def close(self) -> None:
        """Free what the sampler holds; nothing is drawn after it."""


class LocalSampler:
    """A sampler in this process that reads the policy's own weights, without a copy."""

    def __init__(self, *, cache_bytes: int, fixed_shapes: bool = False) -> None:
        """`cache_bytes` bounds the key-value cache; one completion of each prompt is drawn whatever it takes.

        `fixed_shapes` makes decoding steps that a GPU records and replays.
        """
        self.cache_bytes, self.fixed_shapes = cache_bytes, fixed_shapes
        self.policy: LanguageModel | None = None

    def load_policy(self, policy: LanguageModel) -> None:
        """Keep a reference to the policy, from whose current weights every later draw samples."""
        self.policy = policy

    def draw(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> SampledCompletions:
        """Sample k completions of every prompt in this process. Raises RuntimeError before `load_policy`."""
        if self.policy is None:
            raise RuntimeError("no policy to sample from: call load_policy first")
        token_budget = count_cacheable_tokens(self.policy, self.cache_bytes)
        return sample_completions(
            self.policy, prompts, **options, token_budget=token_budget, fixed_shapes=self.fixed_shapes
        )

    def close(self) -> None:
        """Do nothing: the policy is its owner's."""
