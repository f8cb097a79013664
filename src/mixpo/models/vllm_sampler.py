"""Sampling by a vLLM server over HTTP. All that mixpo knows of vLLM's protocol, which changes, is in this file.

vLLM pins another torch than mixpo's, so it has an environment of its own. The server runs already, or is started with
that environment's Python. A policy with LoRA adapters is handed over as an adapter of the base that the server holds,
under a new name each time; of any other policy all weights are reloaded from a folder.

A server that kept an earlier policy would give numbers that look right. So log-probs of fixed tokens are compared with
the policy's own at every hand-over, and those of a few completions at every draw.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mixpo.data.branches import Completions
from mixpo.data.errors import InputError
from mixpo.models.adapter_folders import collect_adapter_weights, write_adapter_folder
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

SUPPORTED_VERSIONS = (0, 32), (0, 33)
"""The first and the last release series of vLLM whose protocol this is."""
CONCURRENT_REQUESTS = 256
"""Requests in flight, one a completion."""
START_SECONDS, REQUEST_SECONDS, CHECK_SECONDS, STOP_SECONDS = 900.0, 600.0, 10.0, 20.0
"""Longest wait for a server to start, for the answer to one request, for its version, and until it ends by itself."""
TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean difference, in nats a token, between the server's log-probs and the policy's own, above which both differ."""
PROBED_COMPLETIONS, PROBED_TOKENS = 4, 16
"""Fixed completions of the comparison at a hand-over, and tokens of each."""
CHECKED_COMPLETIONS = 4
"""Completions of a draw that are compared with a forward pass."""
CHECK_TOKENS = 2048
"""Tokens of a batch of these forward passes."""
UNUSED_TOKEN_BIAS = -100.0
"""Added to the logits of `unused_tokens`: the lowest bias that the protocol has."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM has for the highest rank of adapters."""
UNSHARED_VARIABLES = ("PYTHONPATH", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
"""Beginnings of the names of environment variables that are about this process: its packages, and its rank."""

SERVER_PROGRAM = """
import os, runpy, signal, threading, time

def end_with_parent():
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(%d)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""
"""Program of a started server: it ends when its standard input closes, which a killed parent's does too."""


def is_server_address(place: str) -> bool:
    """True if it is the address of a server, and not the path of a Python that starts one."""
    return place.startswith(("http://", "https://"))


def check_vllm(place: str) -> None:
    """Raise `InputError` unless a server answers at an address, or a Python's environment has vLLM.

    A vLLM server must have a supported version; another one has none to ask for.
    """
    if is_server_address(place):
        VLLMServer(place.rstrip("/"), request_seconds=CHECK_SECONDS).check_version()
        return
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    with suppress(OSError):
        if subprocess.run([place, "-c", program], check=False, capture_output=True).returncode == 0:
            return
    raise InputError(
        f"runtime.vllm: found {place!r}, which is not a Python that has vLLM; expected the path of one, or "
        "http://HOST:PORT of a running server; see docs/vllm.md"
    )


class MissingEndpointError(InputError):
    """Exception: a server has no such path."""


class VLLMServer:
    """A vLLM server at an address, with its process if it was started here."""

    def __init__(
        self,
        address: str,
        *,
        process: subprocess.Popen[bytes] | None = None,
        log: Path | None = None,
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        self.address, self.process, self.log, self.request_seconds = address, process, log, request_seconds
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @classmethod
    def start(
        cls, python: Path, model: Path, *, precision: Precision, cache_bytes: int, arguments: Sequence[str], log: Path
    ) -> Self:
        """Start a server of a model's folder with a Python that has vLLM, and wait until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            *(str(python), "-c", SERVER_PROGRAM % STOP_SECONDS, "--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", precision, "--generation-config", "vllm"),
            *("--max-model-len", "auto", "--kv-cache-memory-bytes", str(cache_bytes), *arguments),
        ]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(UNSHARED_VARIABLES)},
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise InputError(
                    f"runtime.vllm: found {python}, which does not start ({error.strerror}); expected the Python of an "
                    "environment that has vLLM, or the address of a running server"
                ) from error
        server = cls(f"http://127.0.0.1:{port}", process=process, log=log)
        try:
            server._wait_until_healthy()
        except BaseException:
            server.close()
            raise
        return server

    def _wait_until_healthy(self) -> None:
        """Wait for the first answer of a started server. Raises `InputError` if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                self._report_failure("a server that ended while it started")
            with suppress(OSError, HTTPException), self.opener.open(f"{self.address}/health", timeout=5):
                return
            time.sleep(0.2)
        self._report_failure(f"no answer {START_SECONDS:.0f} s after its start")

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON answer to a GET, or to a POST of a JSON body.

        Raises:
            MissingEndpointError: The server has no such path.
            InputError: The server does not answer, or refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"Content-Type": "application/json"})
        try:
            with self.opener.open(request, timeout=self.request_seconds) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            found = f"status {error.code} of {path} ({_read_error_message(error)})"
            self._report_failure(found, MissingEndpointError if error.code == 404 else InputError)
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            waited = isinstance(reason, TimeoutError)
            why = f"in {self.request_seconds:.0f} s" if waited else f"({str(reason) or type(reason).__name__})"
            self._report_failure(f"no answer to {path} {why}")
        try:
            return json.loads(answer) if answer else None
        except ValueError:
            return answer.decode(errors="replace")

    def check_version(self) -> bool:
        """True if the server is a supported vLLM, False if it is another one that has no version to ask for."""
        try:
            version = self.ask("/version")["version"]
        except (MissingEndpointError, TypeError, LookupError):
            return False
        first, last = SUPPORTED_VERSIONS
        numbers = tuple(int(part) if part.isdigit() else -1 for part in str(version).split(".")[:2])
        if not first <= numbers <= last:
            found, expected = f"vLLM {version}", f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
            raise InputError(
                f"{self.address}: found {found}; expected {expected}, whose protocol mixpo speaks; install one of them"
            )
        return True

    def _report_failure(self, found: str, error_class: type[InputError] = InputError) -> NoReturn:
        """Raise an error with what was found and, of a started server, how it ended and where its output is."""
        if self.process is None:
            raise error_class(
                f"{self.address}: found {found}; expected a vLLM server's answer; look at its output, start it again, "
                "and run again: the stage goes on from its last checkpoint"
            )
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # a connection may break before the process has ended
        ended = "" if self.process.returncode is None else f" (it ended with status {self.process.returncode})"
        raise error_class(
            f"vLLM, started by runtime.vllm: found {found}{ended}; expected its answer; the last line of its output, "
            f"{self.log}, is {_read_last_line(self.log)!r}; mend that and run again: the stage goes on from its last "
            "checkpoint"
        )

    def close(self) -> None:
        """End the server if it was started here."""
        if self.process is None or self.process.stdin is None:
            return
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS + 5)
        with suppress(ProcessLookupError):  # what it has left behind
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _read_error_message(error: urllib.error.HTTPError) -> str:
    """First line of what a server says with an error, at most 200 characters."""
    text = error.read().decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return (text.strip().splitlines() or [error.reason])[0][:200]


def _read_last_line(file: Path | None) -> str:
    """Last line of a log that names an error, else its last line; empty if there is none."""
    lines = [] if file is None else [line.strip() for line in file.read_text(errors="replace").splitlines()]
    named = [line for line in lines if "Error" in line]
    return (named or [line for line in lines if line] or [""])[-1][-300:]


class _PolicyProbe(NamedTuple):
    """Fixed tokens whose log-probs show at every hand-over which policy the server computes."""

    completions: Completions
    logprobs: Float[Tensor, " n"]
    """The policy's own when the server was last seen to have followed it, in nats."""
    noise: float
    """Root mean square of the difference between server and policy then, in nats."""


class VLLMSampler:
    """A sampler that asks a vLLM server for completions, one request each.

    A completion's random numbers come from a seed of its own, made of seed, prompt, occurrence and branch. The server's
    logits differ in the last bits with what it computes beside, so a repeated draw may differ where two tokens are
    almost tied; portions and resumed work change nothing in distribution. vLLM raises temperatures under 0.01 to 0.01.
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
        self.is_handed_over = False
        self.is_vllm = True
        self.model_name = self.adapter_name = ""
        self.session, self.number = uuid.uuid4().hex[:8], 0
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
        if not self.is_handed_over:
            self._hand_over(policy)
            self.is_handed_over = True
        occurrences = options.get("occurrences")
        requests = [
            self._make_request(policy, prompt, seed, options)
            for prompt, occurrence in zip(prompts, occurrences or count_earlier_occurrences(prompts), strict=True)
            for seed in _make_request_seeds(prompt, seed=options["seed"], occurrence=occurrence, k=k)
        ]
        answers = _map_concurrently(self._complete, requests)
        for tokens, _ in answers:
            if wrong := set(tokens) & set(policy.unused_tokens) or set(tokens[:-1]) & policy.end_tokens:
                self._refuse(
                    f"a completion with the token {min(wrong)}", "none that the tokenizer does not have or after an end"
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
        self._compare_logprobs(sampled.logprobs[:count][..., : own.shape[-1]][few.mask], own[few.mask], "a draw")
        return sampled

    def close(self) -> None:
        """End the server if it was started here, unload the adapter if not, and delete what was handed over."""
        if self.server is not None:
            if self.server.process is None and self.adapter_name:
                with suppress(InputError):
                    self.server.ask("/v1/unload_lora_adapter", {"lora_name": self.adapter_name})
            self.server.close()
        self.server = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_request(
        self, policy: LanguageModel, prompt: Sequence[int], seed: int, options: SamplingOptions
    ) -> dict[str, Any]:
        """The request for one completion of a prompt; nothing is left to the server's defaults."""
        request: dict[str, Any] = {
            "model": self.model_name,
            "prompt": list(prompt),
            "max_tokens": options["max_tokens"],
            "seed": seed,
            "temperature": options.get("temperature", 1.0),
            "top_p": options.get("top_p", 1.0),
            "top_k": options.get("top_k", 0),
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": sorted(policy.end_tokens),
            "ignore_eos": True,  # the model's own, which may be another
            "cache_salt": f"{self.session}-{self.number}",  # no key or value of an earlier policy
        }
        if policy.unused_tokens:
            request["logit_bias"] = {str(token): UNUSED_TOKEN_BIAS for token in policy.unused_tokens}
        return request

    def _complete(self, request: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Tokens and log-probs of the completion that is asked for."""
        choice = self._ask_for_choice(request)
        tokens, logprobs = choice.get("token_ids"), choice["logprobs"]["token_logprobs"]
        if not tokens or len(tokens) != len(logprobs):
            self._refuse("a completion without token_ids", "token ids and log-probs; it is no vLLM, or an old one")
        if choice["finish_reason"] not in ("stop", "length"):
            self._refuse(f"a completion that finished by {choice['finish_reason']!r}", "one by stop or length")
        return tokens, logprobs

    def _ask_for_choice(self, request: dict[str, Any]) -> dict[str, Any]:
        """The one choice in the answer to a request for a completion."""
        assert self.server is not None
        answer = self.server.ask("/v1/completions", request)
        try:
            choice: dict[str, Any] = answer["choices"][0]
            choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        except (TypeError, LookupError):
            self._refuse("an answer to /v1/completions without log-probs", "a choice with logprobs.token_logprobs")
        return choice

    # Handing over

    def _hand_over(self, policy: LanguageModel) -> None:
        """Let the server compute the policy's current weights, and compare log-probs with the policy's own."""
        completions = self._draw_probe(policy) if self.probe is None else self.probe.completions
        prompts = [[policy.end_token]] * len(completions.tokens)
        own = compute_token_logprobs(policy, prompts, completions, token_budget=CHECK_TOKENS)[completions.mask]
        refuse_non_finite_logprobs(own)
        self.number += 1
        if policy.adapters:
            self._load_adapter(policy)
        else:
            self._load_weights(policy)
        served = self._score_on_server(policy, prompts, completions)
        self._compare_logprobs(served, own, "the hand-over")
        self.probe = self._check_that_server_followed(completions, served, own)

    def _load_adapter(self, policy: LanguageModel) -> None:
        """Load the policy's adapter on the server under a new name, in place of the one before."""
        folder = self.folder / str(self.number)
        weights = collect_adapter_weights(policy)
        if whole := next((name for name in weights if ".lora_" not in name), None):
            self._refuse(f"an adapter with {whole}, which trains whole", "none of lora.modules_to_save")
        rank = max(len(weight) for name, weight in weights.items() if name.endswith(".lora_A"))
        write_adapter_folder(policy, folder)
        if self.server is None:
            assert policy.folder is not None
            highest = next((size for size in LORA_RANKS if size >= rank), rank)
            self._connect(policy, policy.folder, "--enable-lora", "--max-loras", "1", "--max-lora-rank", str(highest))
        assert self.server is not None
        if self.adapter_name:
            self.server.ask("/v1/unload_lora_adapter", {"lora_name": self.adapter_name})
            shutil.rmtree(self.folder / str(self.number - 1), ignore_errors=True)
        name = f"mixpo-{self.session}-{self.number}"
        try:
            self.server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except MissingEndpointError:
            self._refuse(
                "no /v1/load_lora_adapter",
                f"a server of {policy.folder} with --enable-lora --max-lora-rank {rank} and the environment variable "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
            )
        self.model_name = self.adapter_name = name

    def _load_weights(self, policy: LanguageModel) -> None:
        """Let the server read all weights from a folder: the policy's own if it is not trained, else a new one.

        A new folder has an output head of its own, even if it is tied to the embedding: vLLM on a CPU keeps the old
        head when it reloads a tied one.
        """
        is_trained = policy.folder is None or any(weight.requires_grad for weight in policy.parameters())
        folder = self.folder / "weights" if is_trained else policy.folder
        assert folder is not None
        if is_trained:
            write_current_weights(policy, folder)
        if self.server is None:
            self._connect(policy, folder)
        assert self.server is not None
        if not self.is_vllm:
            served = Path(self._list_models()[0].get("root") or "")
            if is_trained or served.absolute() != folder.absolute():
                self._refuse(f"a server of {served} that is no vLLM", f"one of {folder}, whose weights are not trained")
        elif self.server.process is None or self.number > 1:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.absolute())}}
            try:
                self.server.ask("/collective_rpc", body)
                self.server.ask("/reset_prefix_cache", {})
            except MissingEndpointError:
                self._refuse(
                    "no /collective_rpc, by which weights are reloaded",
                    "a server with the environment variable VLLM_SERVER_DEV_MODE=1",
                )

    def _connect(self, policy: LanguageModel, model: Path, *arguments: str) -> None:
        """Start a server of a model's folder, or contact the running one; check its version and find its model."""
        if is_server_address(self.place):
            self.server = VLLMServer(self.place.rstrip("/"), request_seconds=self.request_seconds)
        else:
            self.server = VLLMServer.start(
                Path(self.place),
                model.absolute(),
                precision=policy.precision,
                cache_bytes=self.cache_bytes,
                arguments=[*arguments, *self.arguments],
                log=self.folder.parent / "vllm.log",
            )
            self.server.request_seconds = self.request_seconds
        self.is_vllm = self.server.check_version()
        self.model_name = self._list_models()[0]["id"]

    def _list_models(self) -> list[dict[str, Any]]:
        """What the server says of its models, the base model first."""
        assert self.server is not None
        answer = self.server.ask("/v1/models")
        models: list[dict[str, Any]] = answer.get("data", []) if isinstance(answer, dict) else []
        if not models:
            self._refuse("no model at /v1/models", "one")
        return models

    # Checks

    def _draw_probe(self, policy: LanguageModel) -> Completions:
        """Completions of the end token by the policy itself. Raises `InputError` if its logits are not finite."""
        sampled = sample_completions(
            policy, [[policy.end_token]], k=PROBED_COMPLETIONS, max_tokens=PROBED_TOKENS, seed=0
        )
        return Completions.from_lists([[completion] for completion in sampled.to_lists()[0]])

    def _score_on_server(
        self, policy: LanguageModel, prompts: Sequence[Sequence[int]], completions: Completions
    ) -> Float[Tensor, " n"]:
        """The server's log-probs of given completions, one a prompt, in nats, in the order of their mask."""
        scores = []
        options: SamplingOptions = {"k": 1, "max_tokens": 1, "seed": 0}
        for prompt, (completion,) in zip(prompts, completions.to_lists(), strict=True):
            request = self._make_request(policy, [*prompt, *completion], 0, options)
            logprobs = self._ask_for_choice({**request, "echo": True})["logprobs"]["token_logprobs"]
            scores += logprobs[len(prompt) : len(prompt) + len(completion)]
        return torch.tensor(scores, dtype=torch.float32)

    def _compare_logprobs(self, served: Float[Tensor, " n"], own: Float[Tensor, " n"], occasion: str) -> None:
        """Raise `InputError` unless the server's log-probs of the same tokens are the policy's own."""
        assert self.policy is not None
        difference, tolerance = float((served - own).abs().mean()), TOLERANCE[self.policy.precision]
        if not difference <= tolerance:
            self._refuse(
                f"log-probs {difference:.3g} nats a token from the policy's own at {occasion}",
                f"at most {tolerance:g}: the server computes another model, in another precision, or was restarted",
            )

    def _check_that_server_followed(
        self, completions: Completions, served: Float[Tensor, " n"], own: Float[Tensor, " n"]
    ) -> _PolicyProbe:
        """Raise `InputError` if the server still computes an earlier policy; returns what the next check goes by.

        An update may move log-probs by less than `TOLERANCE`. So, once the policy has moved away from an earlier one by
        more than twice what server and policy differed by then, the server must be nearer to the policy now.
        """
        noise = _compute_rms(served - own)
        if self.probe is None:
            return _PolicyProbe(completions, own, noise)
        if _compute_rms(own - self.probe.logprobs) <= 2 * self.probe.noise:
            return self.probe  # as yet too near to tell
        if _compute_rms(served - self.probe.logprobs) <= noise:
            self._refuse("log-probs of an earlier policy at the hand-over", "those of the policy that was handed over")
        return _PolicyProbe(completions, own, noise)

    def _refuse(self, found: str, expected: str) -> NoReturn:
        """Raise `InputError` about the server's answer."""
        where = "vLLM, started by runtime.vllm" if self.server is None or self.server.process else self.server.address
        raise InputError(f"{where}: found {found}; expected {expected}; see docs/vllm.md")


def _make_request_seeds(prompt: Sequence[int], *, seed: int, occurrence: int, k: int) -> list[int]:
    """Seeds of k completions of a prompt, of 63 bits."""
    keys = make_noise_keys(prompt, seed=seed, occurrence=occurrence, k=k, max_tokens=1)
    return [key & (2**63 - 1) for key in keys[:, 0].tolist()]


def _map_concurrently(
    complete: Callable[[dict[str, Any]], tuple[list[int], list[float]]], requests: Sequence[dict[str, Any]]
) -> list[tuple[list[int], list[float]]]:
    """Results of all requests, in order; the first error ends it."""
    with ThreadPoolExecutor(min(CONCURRENT_REQUESTS, len(requests))) as pool:
        futures = [pool.submit(complete, request) for request in requests]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compute_rms(values: Float[Tensor, " n"]) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())
