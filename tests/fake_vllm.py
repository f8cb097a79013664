"""A server that speaks vLLM's protocol, or SGLang's, and computes with transformers, peft and our own sampler."""

import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixpo.models.language_model import LanguageModel
from mixpo.models.network import Network
from mixpo.models.sampling import sample_completions
from models import plain_logprobs

SGLANG_PATHS = ("/health", "/v1/models", "/v1/completions")


class FakeVLLM:
    """The server, and what a test may change about it."""

    def __init__(self, base: Path | None = None, *, unix_socket: str | None = None) -> None:
        """Start it on loopback, or on a Unix socket."""
        self.version: str | None = "0.32.1"
        self.base = base
        """The folder whose model it starts with."""
        self.root: str | None = str(base)
        """What it says of that folder."""
        self.is_sglang = False
        self.missing_paths: set[str] = set()
        self.ignores_hand_over = False
        self.hangs: Callable[[Any], bool] = lambda body: False
        """Whether it leaves a request without an answer, for a minute."""
        self.hanging, self.unanswered, self.is_closed = threading.Semaphore(0), 0, threading.Event()
        """One for each such request that came, and the number of those whose minute is over."""
        self.change_choice: Callable[[dict[str, Any]], Any] = lambda choice: None
        self.requests: list[tuple[str, Any]] = []
        self.models: dict[str, PreTrainedModel] = {} if base is None else {"base": _load_model(base)}
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                if fake.hangs(body):
                    fake.hanging.release()
                    fake.is_closed.wait(60)
                    fake.unanswered += 1
                    return
                with fake.lock:
                    fake.requests.append((self.path, body))
                    status, answer = fake.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Print nothing."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 512
            address_family = socket.AF_INET if unix_socket is None else socket.AF_UNIX
            server_bind = socketserver.TCPServer.server_bind  # HTTPServer's takes no path

            def handle_error(self, *_: Any) -> None:
                """Print nothing of connections that were broken off."""

        self.server = Server(("127.0.0.1", 0) if unix_socket is None else unix_socket, Handler)  # type: ignore[arg-type]
        self.address = unix_socket or f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.is_closed.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of the answer to a request."""
        if path in self.missing_paths or (self.is_sglang and path not in SGLANG_PATHS):
            return 404, {"detail": "Not Found"}
        if path == "/health":
            return 200, None
        if path == "/version":
            return (404, {"detail": "Not Found"}) if self.version is None else (200, {"version": self.version})
        if path == "/v1/models":
            return 200, {"data": [{"id": "base", "root": self.root}]}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            if not self.ignores_hand_over or "base" not in self.models:
                self.models["base"] = _load_model(Path(body["kwargs"]["weights_path"]))
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/v1/load_lora_adapter":
            adapted = [model for name, model in self.models.items() if name.startswith("mixpo-")]
            assert self.base is not None
            model = PeftModel.from_pretrained(_load_model(self.base), body["lora_path"]).merge_and_unload().eval()
            self.models[body["lora_name"]] = adapted[-1] if self.ignores_hand_over and adapted else model
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            name = body["lora_name"]
            self.models[f"old {name}" if not self.ignores_hand_over else f"mixpo-old {name}"] = self.models.pop(name)
            return 200, "Success"
        assert path == "/v1/completions"
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if len(body["prompt"]) + body["max_tokens"] > 128:
            return 400, {"error": {"message": "max_tokens cannot be greater than max_model_len=128."}}
        if self.is_sglang and (body["top_k"] < 1 and body["top_k"] != -1):
            return 400, {"message": f"top_k must be -1 (disable) or at least 1, got {body['top_k']}."}
        choice = self._echo(body) if body.get("echo") else self._complete(body)
        self.change_choice(choice)
        return 200, {"choices": [choice]}

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion, as `LocalSampler` draws it, with the seed of the request."""
        first, *others = body["stop_token_ids"]
        unused = tuple(int(token) for token, bias in body.get("logit_bias", {}).items() if bias == -100)
        lm = LanguageModel(
            Network(self.models[body["model"]]),
            None,  # type: ignore[arg-type]
            first,
            end_tokens=frozenset(others),
            unused_tokens=unused,
        )
        options = {name: body[name] for name in ("max_tokens", "seed", "temperature", "top_p")}
        options["top_k"] = max(0, body["top_k"])
        sampled = sample_completions(lm, [body["prompt"]], k=1, **options)
        (tokens,), logprobs = sampled.to_lists()[0], sampled.logprobs[0, 0].tolist()
        reason = "stop" if bool(sampled.ended[0, 0]) else "length"
        return {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}

    @torch.no_grad()
    def _echo(self, body: dict[str, Any]) -> dict[str, Any]:
        """Log-probs of the prompt's own tokens, and of one more, which is not looked at.

        SGLang computes those of the prompt if it is asked for others beside.
        """
        prompt = body["prompt"]
        logprobs = plain_logprobs(self.models[body["model"]], prompt[:1], prompt[1:]).tolist()
        if self.is_sglang and body["logprobs"] == 0:
            logprobs = []
        return {"token_ids": [0], "logprobs": {"token_logprobs": [None, *logprobs, -1.0]}, "finish_reason": "length"}


def _load_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


PROGRAM = """
import sys, threading
sys.path[:0] = {path!r}
print(" ".join(sys.argv), flush=True)
print("(APIServer pid=1) WARNING 01-01 00:00:00 [system.py:1] This can cause errors like `OSError: [Errno 24]`")
from pathlib import Path
from fake_vllm import FakeVLLM
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
fake = FakeVLLM(Path(options["--model"]), unix_socket=options["--uds"])
print("started", flush=True)
threading.Event().wait()
"""


def write_python_with_fake_vllm(folder: Path) -> str:
    """Write a Python whose vLLM is this server, and an environment for it; returns its path."""
    package = folder / "environment" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(PROGRAM.format(path=sys.path))
    for parent in (package, package.parent, package.parent.parent):
        (parent / "__init__.py").touch()
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/environment exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)
