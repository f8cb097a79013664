"""Serving a study: the port first, then the pages."""

import errno
import ipaddress
import logging
import socket
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from mixpo.data.errors import InputError

HOST, PORT = "127.0.0.1", 8765
UNENCRYPTED = (
    "warning: without TLS, whoever is on the network between can read links and judgements; "
    "expected --tls-cert and --tls-key, or --address with https:// where a proxy encrypts"
)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, on a free port if `port` is 0. Raises `InputError` where it cannot."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host: found {host!r} ({error.strerror}); expected an address of this machine") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port: found {port} taken; expected a free one; 0 takes any that is free") from error
        raise InputError(
            f"--host, --port: found {host}:{port}, which cannot be listened to ({error.strerror}); choose others"
        ) from error
    return listening


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def addresses(host: str, port: int, given: str | None, *, tls: bool) -> tuple[str, list[str]]:
    """The address that links begin with, and the Host headers that are answered. Raises `InputError` on a bad one."""
    if given is None:
        if host in ("0.0.0.0", "::"):
            raise InputError(
                f"--host: found {host}, which is every address of this machine; expected also --address, such as "
                f"http://192.168.1.7:{port}, under which the annotators reach it"
            )
        named = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        names = [named, f"localhost:{port}", f"127.0.0.1:{port}"] if is_loopback(host) else [named]
        if port == (443 if tls else 80):  # which browsers leave out
            names = [name.removesuffix(f":{port}") for name in names]
        return f"{'https' if tls else 'http'}://{named}", [name.lower() for name in names]
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
        raise InputError(f"--address: found {given!r}; expected such as https://study.example.org, without a path")
    return f"{parts.scheme}://{parts.netloc}", [parts.netloc.lower()]


def serve(app: ASGIApp, listening: socket.socket, cert: Path | None, key: Path | None) -> None:
    """Answer until Ctrl-C. Nothing is logged of requests, whose first address holds a token."""
    logging.getLogger("mixpo.study").addHandler(logging.StreamHandler())
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=5,
        ssl_certfile=cert,
        ssl_keyfile=key,
    )
    try:
        config.load()
    except OSError as error:  # of the certificate
        raise InputError(f"--tls-cert, --tls-key: found no usable pair ({error}); expected PEM files") from error
    uvicorn.Server(config).run(sockets=[listening])
