"""The interface through which every stage samples completions, and its implementation in this process."""

from collections.abc import Sequence
from typing import Protocol

from mixpo.models.language_model import LanguageModel
from mixpo.models.sampling import SampledCompletions, sample


class Sampler(Protocol):
    """An engine that samples completions from a policy."""

    def load_policy(self, policy: LanguageModel) -> None:
        """Take over the policy's weights as they are now: what is sampled next comes from them."""

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

        The log-probs are the policy's own, at temperature 1 and not truncated. `occurrences` (`count_occurrences` of a
        larger set that the prompts are a portion of) tell equal prompts apart; those of the prompts if not given.
        """


class LocalSampler:
    """Samples from the policy's own weights, so nothing is copied."""

    def __init__(self, *, cache_tokens: int) -> None:
        """`cache_tokens` bounds the tokens in the key-value cache at once."""
        self.cache_tokens = cache_tokens
        self.policy: LanguageModel | None = None

    def load_policy(self, policy: LanguageModel) -> None:
        """Sample from this policy."""
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
        """Sample as `sample` does. Raises RuntimeError before `load_policy`."""
        if self.policy is None:
            raise RuntimeError("no policy to sample from: call load_policy first")
        return sample(
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
