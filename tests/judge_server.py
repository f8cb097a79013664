"""A chat server on loopback whose responses a test defines."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Response = tuple[int, dict[str, str], bytes | Iterator[bytes]]
"""Status, headers and the body: whole, or in parts that may never end."""


def format_scores(first: object, second: object) -> str:
    """Two scores in the format of the paper's prompt."""
    return (
        f"Response 1 Quality Score: {first}\nExplanation: because.\n\n"
        f"Response 2 Quality Score: {second}\nExplanation: so."
    )


def make_completion(content: Any, *, tokens: tuple[int, int] | None = (10, 5), finish: str = "stop") -> Response:
    """A chat completion as a response."""
    body: dict[str, Any] = {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}],
    }
    if tokens is not None:
        body["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    return make_response(json.dumps(body).encode())


def make_error(status: int, message: str, **headers: str) -> Response:
    """An error response."""
    return make_response(json.dumps({"error": {"message": message}}).encode(), status, **headers)


def make_response(body: bytes | Iterator[bytes], status: int = 200, **headers: str) -> Response:
    """A response; underscores in header names become hyphens."""
    renamed = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/json", **renamed}, body


@dataclass
class JudgeRequest:
    """A request that the server received."""

    body: dict[str, Any]
    key: str
    number: int
    """Index of the request, from 0."""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def completions(self) -> list[str]:
        """The two completions in the order shown."""
        return self.body["messages"][0]["content"].rpartition("\n\nResponse 1: ")[2].split("\n\nResponse 2: ")

    @property
    def prompt(self) -> int:
        """The number of the prompt that it shows."""
        return int(re.match(r"answer (\d)", self.completions[0])[1])

    @property
    def model(self) -> str:
        return self.body["model"]


@dataclass
class Server:
    """The server's received requests and its behaviour."""

    url: str = ""
    respond: Callable[[JudgeRequest], Response | str] = lambda requests: make_completion(format_scores(8, 5))
    """Makes the response to a request; `cut` closes the connection, `slow` waits."""
    requests: list[JudgeRequest] = field(default_factory=list)
    max_concurrent: int = 0
    """The most requests that were active at once."""
    sent_bytes: list[int] = field(default_factory=list)
    """Bytes sent of every body in parts."""
    closing: threading.Event = field(default_factory=threading.Event)

    def prefer(self, choose: Callable[[JudgeRequest], bool | None]) -> None:
        """Score the first shown completion higher (True), lower (False) or equal (None)."""
        scores = {True: (9, 4), False: (4, 9), None: (6, 6)}
        self.respond = lambda request: make_completion(format_scores(*scores[choose(request)]))

    def override(self, choose: Callable[[JudgeRequest], Response | str | None]) -> None:
        """Respond as `choose` says, and where it returns None as before."""
        respond_before = self.respond
        self.respond = lambda request: choose(request) or respond_before(request)


@contextmanager
def run_server() -> Iterator[Server]:
    """Run a server in a thread."""
    server = Server()
    lock, active = threading.Lock(), set[int]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                key = self.headers.get("Authorization", "")
                request = JudgeRequest(body, key, len(server.requests), dict(self.headers))
                server.requests.append(request)
                active.add(request.number)
                server.max_concurrent = max(server.max_concurrent, len(active))
            response = server.respond(request)
            if response == "slow":
                server.closing.wait(10)
            with lock:
                active.remove(request.number)
            if isinstance(response, str):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, content = response
            self.send_response(status)
            if isinstance(content, bytes):
                headers = {**headers, "Content-Length": str(len(content))}
            else:
                self.close_connection = True
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if isinstance(content, bytes):
                self.wfile.write(content)
                return
            written = 0
            try:
                for part in content:
                    written += self.wfile.write(part)
            finally:
                server.sent_bytes.append(written)

        def log_message(self, *args: object) -> None:
            pass

    class Http(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # of connections that are not taken yet: beyond it they wait a second

        def handle_error(self, *args: object) -> None:
            pass

    http = Http(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        http.shutdown()
        thread.join()
        http.server_close()
