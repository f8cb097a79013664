"""A vLLM server: its process, its HTTP routes and their arguments. vLLM's protocol, which changes, is known here alone.

vLLM pins another torch than mixpo's, so it has an environment of its own. The server runs already, or is started with
that environment's Python. Servers of another kind are asked for completions in the same way, but take over no policy.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit

from mixpo.data.errors import InputError

SUPPORTED_VERSIONS = (0, 32), (0, 33)
"""The first and the last release series of vLLM whose protocol this is."""
CONCURRENT_REQUESTS = 256
"""Requests in flight, one a completion."""
START_SECONDS, REQUEST_SECONDS, CHECK_SECONDS, STOP_SECONDS = 900.0, 600.0, 10.0, 20.0
"""Longest wait for a server to start, for the answer to one request, for one before and after a run, and until it ends
by itself."""
UNUSED_TOKEN_BIAS = -100.0
"""Added to the logits of tokens that must not be drawn: the lowest bias that the protocol has."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM has for the highest rank of adapters."""
UNSHARED_VARIABLES = ("PYTHONPATH", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
"""Beginnings of the names of environment variables that are about this process: its packages, and its rank."""

SERVER_PROGRAM = """
import os, runpy, shutil, signal, threading, time

def end_with_parent():
    while os.read(0, 1024):
        pass
    shutil.rmtree({folder!r}, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep({seconds})
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""
"""Program of a started server: it ends when its standard input closes, which a killed parent's does too, and deletes
the folder of its socket."""


def is_server_address(place: str) -> bool:
    """True if it is the address of a server, and not the path of a Python that starts one."""
    return "://" in place


def check_vllm(place: str) -> None:
    """Raise `InputError` unless a server with a model answers at an address, or a Python's environment has vLLM.

    A vLLM server must have a supported version; another one has none to ask for.
    """
    if is_server_address(place):
        VLLMServer.connect(place, request_seconds=CHECK_SECONDS)
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
    """Exception: a server has no such path, or nothing there."""


class VLLMServer:
    """A server that holds a model and completes prompts: `connect` or `start` one.

    Completions are those of the model in the folder that it was started on, until `load_adapter` or `reload_weights`.
    """

    def __init__(
        self,
        address: str,
        *,
        request_seconds: float,
        process: subprocess.Popen[bytes] | None = None,
        log: Path | None = None,
    ) -> None:
        """Use a server at http(s)://HOST:PORT, or at the path of a Unix socket; it is not contacted yet."""
        self.address, self.request_seconds, self.process, self.log = address, request_seconds, process, log
        self.session, self.policy_number = uuid.uuid4().hex[:8], 0
        self.is_vllm, self.model_name, self.adapter_name, self.model_folder = True, "", "", ""
        self.open_connections, self.has_hung_up = set[HTTPConnection](), False

    @classmethod
    def connect(cls, address: str, *, request_seconds: float = REQUEST_SECONDS) -> Self:
        """Use the running server at an address. Raises `InputError` if none answers, or one of another version."""
        server = cls(_normalize_address(address), request_seconds=request_seconds)
        server._identify()
        return server

    @classmethod
    def start(
        cls,
        python: Path,
        model: Path,
        *,
        precision: str,
        cache_bytes: int,
        lora_rank: int | None = None,
        arguments: Sequence[str] = (),
        log: Path,
        request_seconds: float = REQUEST_SECONDS,
    ) -> Self:
        """Start a server of a model's folder with a Python that has vLLM, and wait until it answers.

        It listens on a socket that only this user can reach. `lora_rank` is the rank of adapters that it will be given.
        """
        folder = tempfile.mkdtemp(prefix="mixpo-", dir="/tmp")  # short: a socket's path has at most 107 bytes
        unix_socket = f"{folder}/vllm"
        lora_arguments = list[str]()
        if lora_rank is not None:
            highest = next((size for size in LORA_RANKS if size >= lora_rank), lora_rank)
            lora_arguments = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(highest)]
        command = [
            *(str(python), "-c", SERVER_PROGRAM.format(folder=folder, seconds=STOP_SECONDS), "--model", str(model)),
            *("--uds", unix_socket, "--dtype", precision, "--generation-config", "vllm"),
            *("--max-model-len", "auto", "--kv-cache-memory-bytes", str(cache_bytes), *lora_arguments, *arguments),
        ]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(UNSHARED_VARIABLES)},
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_API_KEY": "",
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
                os.rmdir(folder)
                raise InputError(
                    f"runtime.vllm: found {python}, which does not start ({error.strerror}); expected the Python of an "
                    "environment that has vLLM, or the address of a running server"
                ) from error
        server = cls(unix_socket, request_seconds=request_seconds, process=process, log=log)
        try:
            server._wait_until_healthy(process)
            server._identify()
        except BaseException:
            server.close()
            raise
        return server

    def close(self) -> None:
        """Unload the adapter of a running server; end one that was started here."""
        if self.process is None:
            self.has_hung_up, self.request_seconds = False, min(self.request_seconds, CHECK_SECONDS)
            with suppress(InputError):
                self._unload_adapter()
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS + 5)
        with suppress(ProcessLookupError):  # what it has left behind
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(Path(self.address).parent, ignore_errors=True)

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the first answer of a started server. Raises `InputError` if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                self._report_failure("a server that ended while it started")
            with suppress(OSError, HTTPException):
                if self._request("/health", None, seconds=5)[0] == 200:
                    return
            time.sleep(0.2)
        self._report_failure(f"no answer {START_SECONDS:.0f} s after its start")

    def _identify(self) -> None:
        """Ask for the version, which only vLLM has, and for the model. Raises `InputError` if mixpo cannot use them."""
        try:
            version = self._request_json("/version")["version"]
        except (MissingEndpointError, TypeError, LookupError):
            self.is_vllm = False
        else:
            first, last = SUPPORTED_VERSIONS
            numbers = tuple(int(part) if part.isdigit() else -1 for part in str(version).split(".")[:2])
            if not first <= numbers <= last:
                self.refuse(
                    f"vLLM {version}",
                    f"{first[0]}.{first[1]} to {last[0]}.{last[1]}, whose protocol mixpo speaks; install one of them",
                )
        try:
            model = self._request_json("/v1/models")["data"][0]  # the base model is the first
            self.model_name, self.model_folder = model["id"], model.get("root") or ""
        except (MissingEndpointError, TypeError, LookupError):
            self.refuse("no model at /v1/models", "a vLLM server, which lists its model there")

    # Which policy it computes

    def load_adapter(self, folder: Path, *, rank: int, base: Path) -> None:
        """Complete by the adapter in a peft folder from now on, in place of the one before.

        Its name is a new one each time: vLLM may keep what it has read under a known name.
        """
        folder = folder.absolute()
        expected = (
            f"a vLLM server of {base} that reads {folder}, with --enable-lora --max-lora-rank {rank} and the "
            "environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        )
        if not self.is_vllm:
            self.refuse("a server that is no vLLM", expected)
        self._unload_adapter()
        self.policy_number += 1
        name = f"mixpo-{self.session}-{self.policy_number}"
        self._request_json("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, expected)
        self.adapter_name = name

    def _unload_adapter(self) -> None:
        """Unload the last adapter, if there is one."""
        if self.adapter_name:
            name, self.adapter_name = self.adapter_name, ""
            self._request_json("/v1/unload_lora_adapter", {"lora_name": name})

    def reload_weights(self, folder: Path) -> None:
        """Complete by the weights in a model's folder from now on; another kind of server must have been started on it.

        The folder has an output head of its own, even if it is tied to the embedding: vLLM on a CPU keeps the old head
        when it reloads a tied one.
        """
        folder = folder.absolute()
        if not self.is_vllm:
            if not self.model_folder or Path(self.model_folder).absolute() != folder:
                self.refuse(
                    f"a server of {self.model_folder or 'a model without a folder'} that is no vLLM",
                    f"one of {folder}, or vLLM, which takes over weights",
                )
            return
        self._unload_adapter()
        self.policy_number += 1
        expected = "a server with the environment variable VLLM_SERVER_DEV_MODE=1"
        self._request_json(
            "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}, expected
        )
        self._request_json("/reset_prefix_cache", {}, expected)

    # What it computes

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        end_tokens: frozenset[int],
        unused_tokens: Sequence[int],
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probs in nats of one completion of each prompt, the end token included.

        A request each: prompts of one request would have the same seed, and so the same noise.

        Args:
            prompts: Token ids.
            seeds: Seed of each completion, of 63 bits.
            max_tokens: Longest completion.
            temperature: Of the draw; log-probs are those at temperature 1. vLLM raises those under 0.01 to 0.01.
            top_p: Share of the probability that is kept.
            top_k: Tokens that are kept; 0 keeps all.
            end_tokens: Tokens that end a completion.
            unused_tokens: Tokens that are never drawn.
        """
        bias = {str(token): UNUSED_TOKEN_BIAS for token in unused_tokens}
        options = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k or -1,  # SGLang refuses 0
            "stop_token_ids": sorted(end_tokens),
            **({"logit_bias": bias} if bias else {}),
        }

        def complete_one(prompt: Sequence[int], seed: int) -> tuple[list[int], list[float]]:
            """Raises `InputError` unless the completion is a whole one."""
            choice = self._request_completion(prompt, {**options, "seed": seed})
            tokens, logprobs = choice.get("token_ids"), choice["logprobs"]["token_logprobs"]
            if not tokens or len(tokens) != len(logprobs):
                self.refuse("a completion without token_ids", "token ids and log-probs; it is no vLLM, or an old one")
            if tokens[-1] not in end_tokens and len(tokens) != max_tokens:
                self.refuse(
                    f"a completion that finished by {choice.get('finish_reason')!r} after {len(tokens)} tokens",
                    f"an end token, or {max_tokens} tokens",
                )
            if wrong := set(tokens).intersection(unused_tokens) or end_tokens.intersection(tokens[:-1]):
                self.refuse(
                    f"a completion with the token {min(wrong)}", "none that the tokenizer does not have or after an end"
                )
            return tokens, logprobs

        self.has_hung_up = False
        with ThreadPoolExecutor(min(CONCURRENT_REQUESTS, len(prompts))) as pool:
            futures = [pool.submit(complete_one, *arguments) for arguments in zip(prompts, seeds, strict=True)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._hang_up()
                raise
        return [future.result() for future in futures]

    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs in nats of the tokens of given completions, one a prompt."""
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            options = {"echo": True, "logprobs": 1, "max_tokens": 1}  # SGLang echoes no log-probs if asked for 0 others
            choice = self._request_completion([*prompt, *completion], options)
            logprobs = choice["logprobs"]["token_logprobs"][len(prompt) : len(prompt) + len(completion)]
            if len(logprobs) != len(completion) or None in logprobs:
                self.refuse("an answer to /v1/completions without the prompt's log-probs", "those that echo asks for")
            scores.append(logprobs)
        return scores

    def _request_completion(self, prompt: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        """The one completion of a prompt, with log-probs. Nothing is left to the server's defaults."""
        request = {
            "model": self.adapter_name or self.model_name,
            "prompt": list(prompt),
            "seed": 0,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "ignore_eos": True,  # the model's own, which may be another
            "cache_salt": f"{self.session}-{self.policy_number}",  # no key or value of an earlier policy
            **options,
        }
        answer = self._request_json("/v1/completions", request)
        try:
            choice: dict[str, Any] = answer["choices"][0]
            choice["logprobs"]["token_logprobs"]
        except (TypeError, LookupError):
            self.refuse("an answer to /v1/completions without log-probs", "a choice with logprobs.token_logprobs")
        return choice

    # Requests and failures

    def _request_json(self, path: str, body: Any = None, expected: str | None = None) -> Any:
        """The JSON answer to a GET, or to a POST of a JSON body. `expected` says which server has the path.

        Raises:
            MissingEndpointError: The server has no such path, or nothing there.
            InputError: The server does not answer, or refuses.
        """
        try:
            status, answer = self._request(path, body, seconds=self.request_seconds)
        except TimeoutError:
            self._report_failure(f"no answer to {path} in {self.request_seconds:.0f} s")
        except OSError as error:
            self._report_failure(f"no answer to {path} ({error})")
        except HTTPException as error:
            self._report_failure(f"no answer to {path} in HTTP ({type(error).__name__})")
        if not 200 <= status < 300:
            found = f"status {status} of {path} ({_read_error_message(answer)})"
            if status == 404 and expected is not None:
                self.refuse(found, expected)
            self._report_failure(found, MissingEndpointError if status == 404 else InputError)
        try:
            return json.loads(answer) if answer else None
        except ValueError:
            return answer

    def _request(self, path: str, body: Any, *, seconds: float) -> tuple[int, str]:
        """Status and text of the answer. No proxy is asked, and no redirection followed."""
        connection = _open_connection(self.address, seconds)
        self.open_connections.add(connection)
        try:
            if self.has_hung_up:
                raise ConnectionAbortedError("after another request failed")
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            self.open_connections.discard(connection)
            connection.close()

    def _hang_up(self) -> None:
        """Break off all requests, whose answers nobody waits for any more."""
        self.has_hung_up = True
        for connection in self.open_connections.copy():
            with suppress(OSError, AttributeError):  # it may be closed, or not connected yet
                connection.sock.shutdown(socket.SHUT_RDWR)

    def refuse(self, found: str, expected: str) -> NoReturn:
        """Raise `InputError` about what the server answered."""
        where = self.address if self.process is None else "vLLM, started by runtime.vllm"
        raise InputError(f"{where}: found {found}; expected {expected}; see docs/vllm.md")

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


def _normalize_address(address: str) -> str:
    """An address without a slash at its end. Raises `InputError` unless it is http(s)://HOST:PORT."""
    expected = "expected http://HOST:PORT of a running vLLM server, such as http://127.0.0.1:8000"
    if "@" in address:
        raise InputError(f"runtime.vllm: found an address with a user name or password; {expected}")
    try:
        parts = urlsplit(address)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname and parts.port)
        (parts.hostname or "").encode("idna")
    except ValueError:
        is_valid = False
    if not is_valid or address.rstrip("/") != f"{parts.scheme}://{parts.netloc}" or not address.isprintable():
        raise InputError(f"runtime.vllm: found {address!r}; {expected}")
    return address.rstrip("/")


class _UnixConnection(HTTPConnection):
    """An HTTP connection through a Unix socket."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket at the path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def _open_connection(address: str, seconds: float) -> HTTPConnection:
    """A connection, which a request opens, to an address or a Unix socket."""
    if not is_server_address(address):
        return _UnixConnection(address, seconds)
    scheme, _, host = address.partition("://")
    return (HTTPSConnection if scheme == "https" else HTTPConnection)(host, timeout=seconds)


def _read_error_message(answer: str) -> str:
    """First line of what a server says with an error, at most 200 characters."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        error = json.loads(answer)
        error = error.get("error", error)
        answer = str(error.get("message") or error["detail"])
    return (answer.strip().splitlines() or ["no reason given"])[0][:200]


def _read_last_line(file: Path | None) -> str:
    """Last line of a log that names an error, else its last line; empty if there is none."""
    lines = list[str]()
    with suppress(OSError):
        lines = [] if file is None else [line.strip() for line in file.read_text(errors="replace").splitlines()]
    named = [line for line in lines if "Error" in line and " WARNING " not in line and "INFO" not in line]
    return (named or [line for line in lines if line] or [""])[-1][-300:]
