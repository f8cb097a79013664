"""The interface through which every stage samples completions, and its implementation in this process."""

from collections.abc import Sequence
from typing import Protocol

from mixpo.models.language_model import LanguageModel
from mixpo.models.sampling import SampledCompletions, sample_completions


class Sampler(Protocol):
    """An engine that samples completions from a policy."""

    def load_policy(self, policy: LanguageModel) -> None:
        """Copy or reference the policy's current weights, from which the next completions are sampled."""

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        k: int,
        max_tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        occurrences: Sequence[int] | None = None,
    ) -> SampledCompletions:
        """Sample k completions of at most `max_tokens` tokens for every prompt.

        The log-probs are the policy's own, at temperature 1 and not truncated. `occurrences` distinguish equal prompts:
        `count_occurrences` of a larger set if the prompts are a part of one, by default of the prompts themselves.
        """


class LocalSampler:
    """A sampler in this process that reads the policy's own weights, without a copy."""

    def __init__(self, *, cache_tokens: int) -> None:
        """`cache_tokens` bounds the tokens in the key-value cache at once."""
        self.cache_tokens = cache_tokens
        self.policy: LanguageModel | None = None

    def load_policy(self, policy: LanguageModel) -> None:
        """Set the policy to sample from."""
        self.policy = policy

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        k: int,
        max_tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        occurrences: Sequence[int] | None = None,
    ) -> SampledCompletions:
        """Sample with `mixpo.models.sampling.sample_completions`. Raises RuntimeError before `load_policy`."""
        if self.policy is None:
            raise RuntimeError("no policy to sample from: call load_policy first")
        return sample_completions(
            self.policy,
            prompts,
            k=k,
            max_tokens=max_tokens,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            occurrences=occurrences,
            token_budget=self.cache_tokens,
        )
