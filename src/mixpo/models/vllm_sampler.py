"""Sampling by a vLLM server: policies are handed over to it, completions drawn on it, and both are checked.

A policy with LoRA adapters is handed over as an adapter of the base that the server holds; of any other policy all
weights are reloaded from a folder. A server that kept an earlier policy would give numbers that look right. So
log-probs of fixed tokens are compared with the policy's own at every hand-over, and those of a few completions at
every draw.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mixpo.data.branches import Completions
from mixpo.data.errors import InputError
from mixpo.models.adapter_folders import write_adapter_folder
from mixpo.models.adapters import iterate_adapter_weights
from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Precision
from mixpo.models.samplers import SamplingOptions
from mixpo.models.sampling import (
    SampledCompletions,
    count_earlier_occurrences,
    make_noise_keys,
    refuse_non_finite_logprobs,
    sample_completions,
)
from mixpo.models.saving import write_current_weights
from mixpo.models.scoring import compute_token_logprobs
from mixpo.models.vllm_server import REQUEST_SECONDS, VLLMServer, is_server_address

TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean difference, in nats a token, between the server's log-probs and the policy's own, above which both differ."""
PROBED_COMPLETIONS, PROBED_TOKENS = 4, 16
"""Fixed completions of the comparison at a hand-over, and tokens of each."""
CHECKED_COMPLETIONS = 4
"""Completions of a draw that are compared with a forward pass."""
CHECK_TOKENS = 2048
"""Tokens of a batch of these forward passes."""


class _PolicyProbe(NamedTuple):
    """Fixed tokens whose log-probs show at every hand-over which policy the server computes."""

    completions: Completions
    logprobs: Float[Tensor, " n"]
    """The policy's own when the server was last seen to have followed it, in nats."""
    noise: float
    """Root mean square of the difference between server and policy then, in nats."""


class VLLMSampler:
    """A sampler that asks a vLLM server for completions.

    A completion's random numbers come from a seed of its own, made of seed, prompt, occurrence and branch. The server's
    logits differ in the last bits with what it computes beside, so a repeated draw may differ where two tokens are
    almost tied; portions and resumed work change nothing in distribution.
    """

    def __init__(
        self,
        place: str,
        *,
        folder: Path,
        cache_bytes: int,
        arguments: Sequence[str] = (),
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        """Use a server, which is contacted at the first draw.

        Args:
            place: Address of a running server, or path of a Python that has vLLM, with which one is started.
            folder: Folder for policies on their way to the server, which must see it under the same path. The output
                of a started server is beside it, in `vllm.log`.
            cache_bytes: Size of a started server's key-value cache.
            arguments: Further command-line arguments of a started server.
            request_seconds: Longest wait for an answer.
        """
        self.place, self.folder, self.cache_bytes, self.arguments = place, folder.absolute(), cache_bytes, arguments
        self.request_seconds = request_seconds
        self.policy: LanguageModel | None = None
        self.server: VLLMServer | None = None
        self.is_handed_over, self.hand_overs = False, 0
        self.probe: _PolicyProbe | None = None

    def load_policy(self, policy: LanguageModel) -> None:
        """Keep a reference to the policy, whose weights at the next draw are handed over to the server."""
        self.policy, self.is_handed_over = policy, False

    def draw(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> SampledCompletions:
        """Sample k completions of every prompt on the server. Raises RuntimeError before `load_policy`.

        Raises:
            InputError: The server does not answer, computes another policy, or draws what it must not.
        """
        policy, k = self.policy, options["k"]
        if policy is None:
            raise RuntimeError("no policy to sample from: call load_policy first")
        server = self.server
        if server is None or not self.is_handed_over:
            server = self._hand_over(policy)
            self.is_handed_over = True
        occurrences = options.get("occurrences") or count_earlier_occurrences(prompts)
        answers = server.complete(
            [prompt for prompt in prompts for _ in range(k)],
            [
                seed
                for prompt, occurrence in zip(prompts, occurrences, strict=True)
                for seed in _make_request_seeds(prompt, seed=options["seed"], occurrence=occurrence, k=k)
            ],
            max_tokens=options["max_tokens"],
            temperature=options.get("temperature", 1.0),
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k", 0),
            end_tokens=policy.end_tokens,
            unused_tokens=policy.unused_tokens,
        )
        lengths = torch.tensor([len(tokens) for tokens, _ in answers]).unflatten(0, (-1, k))
        tokens, logprobs = (
            pad_sequence([torch.tensor(answer[part]) for answer in answers], batch_first=True).unflatten(0, (-1, k))
            for part in (0, 1)
        )
        sampled = SampledCompletions.from_lengths(tokens, logprobs, lengths, policy.end_tokens)
        count = -(-CHECKED_COMPLETIONS // k)
        few = Completions.from_lists(sampled.to_lists()[:count])
        own = compute_token_logprobs(policy, prompts[:count], few, token_budget=CHECK_TOKENS)
        served = sampled.logprobs[:count][..., : own.shape[-1]]
        _require_equal_logprobs(server, served[few.mask], own[few.mask], policy.precision, "a draw")
        return sampled

    def close(self) -> None:
        """End the server if it was started here, unload the adapter if not, and delete what was handed over."""
        if self.server is not None:
            self.server.close()
        self.server = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _hand_over(self, policy: LanguageModel) -> VLLMServer:
        """Let a server compute the policy's current weights, and compare log-probs with the policy's own."""
        completions = _sample_probe_completions(policy) if self.probe is None else self.probe.completions
        prompts = [[policy.end_token]] * len(completions)
        own = compute_token_logprobs(policy, prompts, completions, token_budget=CHECK_TOKENS)[completions.mask]
        refuse_non_finite_logprobs(own)
        self.hand_overs += 1
        server = self._load_adapter(policy) if policy.adapters else self._load_weights(policy)
        scores = server.score(prompts, [completion for (completion,) in completions.to_lists()])
        served = torch.tensor([logprob for logprobs in scores for logprob in logprobs])
        _require_equal_logprobs(server, served, own, policy.precision, "the hand-over")
        probe = _PolicyProbe(completions, own, noise=_compute_rms(served - own))
        self.probe = _require_current_policy(server, served, self.probe, probe)
        return server

    def _load_adapter(self, policy: LanguageModel) -> VLLMServer:
        """Let the server load the sum of the policy's adapters as one adapter, in place of the one before."""
        names = (name for one in policy.adapters for name, _ in iterate_adapter_weights(policy.network, one))
        if whole := next((name for name in names if ".lora_" not in name), None):
            raise InputError(
                f"sampler: found vllm with an adapter that has {whole}, which trains whole; expected none of "
                "lora.modules_to_save; see docs/vllm.md"
            )
        base, folder = policy.folder, self.folder / str(self.hand_overs)
        assert base is not None
        rank = write_adapter_folder(policy, folder)
        server = self.server or self._reach_server(policy, base, lora_rank=rank)
        server.load_adapter(folder, rank=rank, base=base)
        shutil.rmtree(self.folder / str(self.hand_overs - 1), ignore_errors=True)
        return server

    def _load_weights(self, policy: LanguageModel) -> VLLMServer:
        """Let the server read all weights from a folder: the policy's own if it is not trained, else a new one."""
        folder = policy.folder
        if folder is None or any(weight.requires_grad for weight in policy.parameters()):
            folder = self.folder / "weights"
            write_current_weights(policy, folder)
        is_first = self.server is None
        server = self.server or self._reach_server(policy, folder)
        if not is_first or server.process is None:  # it was not started on these very weights
            server.reload_weights(folder)
        return server

    def _reach_server(self, policy: LanguageModel, model: Path, lora_rank: int | None = None) -> VLLMServer:
        """Contact the running server, or start one of a model's folder for adapters of a rank."""
        if is_server_address(self.place):
            self.server = VLLMServer.connect(self.place, request_seconds=self.request_seconds)
        else:
            self.server = VLLMServer.start(
                Path(self.place),
                model.absolute(),
                precision=policy.precision,
                cache_bytes=self.cache_bytes,
                lora_rank=lora_rank,
                arguments=self.arguments,
                log=self.folder.parent / "vllm.log",
                request_seconds=self.request_seconds,
            )
        return self.server


def _sample_probe_completions(policy: LanguageModel) -> Completions:
    """Completions of the end token by the policy itself. Raises `InputError` if its logits are not finite."""
    sampled = sample_completions(policy, [[policy.end_token]], k=PROBED_COMPLETIONS, max_tokens=PROBED_TOKENS, seed=0)
    return Completions.from_lists([[completion] for completion in sampled.to_lists()[0]])


def _require_equal_logprobs(
    server: VLLMServer, served: Float[Tensor, " n"], own: Float[Tensor, " n"], precision: Precision, occasion: str
) -> None:
    """Raise `InputError` unless the server's log-probs of the same tokens are the policy's own."""
    difference, tolerance = float((served - own).abs().mean()), TOLERANCE[precision]
    if not difference <= tolerance:
        server.refuse(
            f"log-probs {difference:.3g} nats a token from the policy's own at {occasion}",
            f"at most {tolerance:g}: the server computes another model, in another precision, or was restarted",
        )


def _require_current_policy(
    server: VLLMServer, served: Float[Tensor, " n"], before: _PolicyProbe | None, now: _PolicyProbe
) -> _PolicyProbe:
    """Raise `InputError` if the server still computes an earlier policy; returns what the next check goes by.

    An update may move log-probs by less than `TOLERANCE`. So, once the policy has moved away from an earlier one by
    more than twice what server and policy differed by then, the server must be nearer to the policy now.
    """
    if before is None:
        return now
    if _compute_rms(now.logprobs - before.logprobs) <= 2 * before.noise:
        return before  # as yet too near to tell
    if _compute_rms(served - before.logprobs) <= now.noise:
        server.refuse("log-probs of an earlier policy at the hand-over", "those of the policy that was handed over")
    return now


def _make_request_seeds(prompt: Sequence[int], *, seed: int, occurrence: int, k: int) -> list[int]:
    """Seeds of k completions of a prompt, of 63 bits."""
    keys = make_noise_keys(prompt, seed=seed, occurrence=occurrence, k=k, max_tokens=1)
    return [key & (2**63 - 1) for key in keys[:, 0].tolist()]


def _compute_rms(values: Float[Tensor, " n"]) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())
