"""A chat server on loopback that judges as it is told, well or badly."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Response = tuple[int, dict[str, str], bytes | Iterator[bytes]]
"""Status, headers and the body: whole, or in parts that may never end."""


def said(one: object, other: object) -> str:
    """Scores as the paper's prompt asks for them."""
    return (
        f"Response 1 Quality Score: {one}\nExplanation: because.\n\nResponse 2 Quality Score: {other}\nExplanation: so."
    )


def completion(content: Any, *, tokens: tuple[int, int] | None = (10, 5), finish: str = "stop") -> Response:
    body: dict[str, Any] = {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}],
    }
    if tokens is not None:
        body["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def error(status: int, message: str, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/json", **named}, json.dumps({"error": {"message": message}}).encode()


@dataclass
class Asked:
    """A request as it came."""

    body: dict[str, Any]
    key: str
    number: int
    """Of the request, from 0."""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> list[str]:
        """The two completions in the order shown."""
        return self.body["messages"][0]["content"].rpartition("\n\nResponse 1: ")[2].split("\n\nResponse 2: ")

    @property
    def model(self) -> str:
        return self.body["model"]


@dataclass
class Server:
    """What it is asked, and what it does about it."""

    url: str = ""
    behave: Callable[[Asked], Response | str] = lambda asked: completion(said(8, 5))
    """A response, or `cut` or `slow`."""
    asked: list[Asked] = field(default_factory=list)
    at_once: int = 0
    """The most requests that were under way together."""
    sent: list[int] = field(default_factory=list)
    """Bytes of every body in parts that could be sent."""
    over: threading.Event = field(default_factory=threading.Event)

    def prefer(self, choose: Callable[[Asked], bool | None]) -> None:
        """Score the first shown completion higher (True), lower (False) or alike (None)."""
        scores = {True: (9, 4), False: (4, 9), None: (6, 6)}
        self.behave = lambda asked: completion(said(*scores[choose(asked)]))


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    lock, under_way = threading.Lock(), set[int]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked = Asked(body, self.headers.get("Authorization", ""), len(server.asked), dict(self.headers))
                server.asked.append(asked)
                under_way.add(asked.number)
                server.at_once = max(server.at_once, len(under_way))
            response = server.behave(asked)
            if response == "slow":
                server.over.wait(10)
            with lock:
                under_way.remove(asked.number)
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
            sent = 0
            try:
                for part in content:
                    sent += self.wfile.write(part)
            finally:
                server.sent.append(sent)

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
        server.over.set()
        http.shutdown()
        thread.join()
        http.server_close()
