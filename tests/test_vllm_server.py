"""A vLLM server's address, process, requests and failures; what a sampler hands over is in test_vllm_sampler.py."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import FakeVLLM, write_python_with_fake_vllm
from mixpo.data.errors import InputError
from mixpo.models.vllm_server import VLLMServer, check_vllm
from models import tiny as tiny_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama's folder."""
    tiny_model("llama").model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def server(base: Path) -> Iterator[FakeVLLM]:
    fake = FakeVLLM(base)
    yield fake
    fake.close()


COMPLETION: dict[str, Any] = {
    "max_tokens": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "end_tokens": frozenset({5}),
    "unused_tokens": (),
}

# --- addresses


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http://:8000",
        "http://127.0.0.1",
        "http://127.0.0.1:",
        "http://127.0.0.1:0",
        "http://127.0.0.1:eight",
        "http://127.0.0.1:800000",
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1:8000?model=a",
        "http://127.0.0.1:8000\n",
        "http://a..b:8000",
        "http://[::1:8000",
        "ftp://127.0.0.1:8000",
        "://127.0.0.1:8000",
    ],
)
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(InputError) as caught:
        check_vllm(address)
    assert str(caught.value) == (
        f"runtime.vllm: found {address!r}; expected http://HOST:PORT of a running vLLM server, such as "
        "http://127.0.0.1:8000"
    )


def test_a_password_in_an_address_is_not_shown() -> None:
    with pytest.raises(InputError, match=r"found an address with a user name or password; expected http://HOST:PORT"):
        check_vllm("http://me:secret@127.0.0.1:8000")


def test_an_address_without_a_scheme_is_a_python_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"found '127.0.0.1:8000', .* expected the path of one, or http://HOST:PORT"):
        check_vllm("127.0.0.1:8000")


def test_a_slash_at_the_end_of_an_address_changes_nothing(server: FakeVLLM) -> None:
    check_vllm(server.address + "/")
    assert [path for path, _ in server.requests] == ["/version", "/v1/models"]


def test_a_server_without_https_is_reported(server: FakeVLLM) -> None:
    with pytest.raises(InputError, match=r"^https://127.*: found no answer to /version \(.*SSL") as caught:
        check_vllm(server.address.replace("http:", "https:"))
    assert "\n" not in str(caught.value)


def test_a_port_of_another_protocol_is_reported() -> None:
    def greet() -> None:
        with listener.accept()[0] as connection:
            connection.sendall(b"220 mail.example.org\r\n")
            connection.recv(1024)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(InputError, match=r"found no answer to /version in HTTP \(BadStatusLine\)"):
            check_vllm(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_a_web_server_without_a_model_is_reported(server: FakeVLLM) -> None:
    server.missing_paths = {"/version", "/v1/models"}
    with pytest.raises(InputError, match=r"found no model at /v1/models; expected a vLLM server"):
        check_vllm(server.address)


def test_a_server_is_asked_for_its_version_before_a_run(server: FakeVLLM) -> None:
    check_vllm(server.address)
    server.version = "1.0"
    with pytest.raises(InputError, match=r"found vLLM 1.0; expected 0.32 to 0.33"):
        check_vllm(server.address)


@pytest.mark.parametrize("place", ["/nowhere/python", sys.executable])
def test_a_python_without_vllm_is_known_before_a_run(place: str) -> None:
    with pytest.raises(
        InputError, match=r"runtime.vllm: found .*, which is not a Python that has vLLM; expected the path"
    ):
        check_vllm(place)


# --- requests


def test_the_first_failure_breaks_off_all_requests(server: FakeVLLM) -> None:
    """Also those that hang."""
    client = VLLMServer.connect(server.address)
    answer = server.answer

    def fail_beside_hanging_requests(path: str, body: Any) -> tuple[int, Any]:
        if body["seed"] != 11:
            return answer(path, body)
        for _ in range(5):
            server.hanging.acquire()
        return 500, {"error": {"message": "EngineDeadError\nTraceback"}}

    server.hangs = lambda body: body["seed"] < 5
    server.answer = fail_beside_hanging_requests  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"found status 500 of /v1/completions \(EngineDeadError\); expected a vLLM"):
        client.complete([[3]] * 300, range(300), **COMPLETION)
    assert server.unanswered == 0, "it did not wait for them"
    assert not client.open_connections
    assert len(client.complete([[3]], [50], **COMPLETION)) == 1, "it can be asked again"


def test_a_completion_is_whole(server: FakeVLLM) -> None:
    """One that ends neither with an end token nor at the longest length is none of the policy's."""
    client = VLLMServer.connect(server.address)

    def cut(choice: dict[str, Any]) -> None:
        choice["token_ids"], choice["logprobs"]["token_logprobs"] = [7], [-1.0]

    server.change_choice = cut
    with pytest.raises(InputError, match=r"that finished by '\w+' after 1 tokens; expected an end token, or 4 tokens"):
        client.complete([[3]], [0], **COMPLETION)


# --- started servers


def start(python: str | Path, model: Path, log: Path) -> VLLMServer:
    return VLLMServer.start(Path(python), model, precision="float32", cache_bytes=1, log=log)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    with pytest.raises(InputError, match=r"found a server that ended while it started .*ModuleNotFoundError.*vllm"):
        start(sys.executable, tmp_path, log)
    with pytest.raises(InputError, match=r"runtime.vllm: found .*nowhere, which does not start \(No such file"):
        start(tmp_path / "nowhere", tmp_path, log)


def test_only_this_user_reaches_a_started_server(tmp_path: Path, base: Path) -> None:
    """It loads what it is told to; it has no port, and the folder of its socket goes with it."""
    server = start(write_python_with_fake_vllm(tmp_path), base, tmp_path / "log")
    folder = Path(server.address).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert Path(server.address).is_socket()
    server.close()
    assert not folder.exists()


def test_a_started_server_that_hangs_is_reported_and_ended(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixpo.models.vllm_server.STOP_SECONDS", 0.0)
    server = start(write_python_with_fake_vllm(tmp_path), base, tmp_path / "log")
    assert server.process is not None
    os.killpg(server.process.pid, signal.SIGSTOP)
    server.request_seconds = 1.0
    try:
        with pytest.raises(InputError, match=r"found no answer to /v1/completions in 1 s; .*/log, is 'started'; mend"):
            server.complete([[3]] * 5, range(5), **COMPLETION)
    finally:
        server.close()
    assert server.process.returncode == -signal.SIGKILL


def test_a_started_server_ends_when_its_parent_is_killed(tmp_path: Path, base: Path) -> None:
    program = f"""
        import sys, time
        from pathlib import Path
        from mixpo.models.vllm_server import VLLMServer
        server = VLLMServer.start(Path({write_python_with_fake_vllm(tmp_path)!r}), Path({str(base)!r}),
                                  precision="float32", cache_bytes=1, log=Path({str(tmp_path / "log")!r}))
        print(server.process.pid, server.address, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        number, address = parent.stdout.readline().split()
        server = int(number)
        os.kill(server, 0)
        parent.kill()
    for _ in range(300):
        try:
            os.kill(server, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(server, signal.SIGKILL)
        pytest.fail("the server is still there")
    assert not Path(address.decode()).parent.exists()
