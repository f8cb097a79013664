"""Serving a study: the port first, then the pages."""

import errno
import ipaddress
import logging
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from mixpo.data.errors import InputError

UNENCRYPTED = (
    "warning: without TLS, whoever is on the network between can read links and judgements; "
    "expected --tls-cert and --tls-key, or --address with https:// where a proxy on this machine encrypts"
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


def addresses(host: str, bound: tuple[str, int], given: str | None, *, tls: bool) -> tuple[str, list[str]]:
    """The address that links begin with, and the Host headers that are answered. Raises `InputError` on a bad one.

    `bound` is what the socket is bound to for `host`.
    """
    if given is not None:
        scheme, name, port = _address(given)
        names = [name]
    else:
        scheme, port = "https" if tls else "http", bound[1]
        if ipaddress.ip_address(bound[0]).is_unspecified:
            raise InputError(
                f"--host: found {host}, which is every address of this machine; expected also --address, such as "
                f"{scheme}://192.168.1.7:{port}, under which the annotators reach it"
            )
        names = [host.lower(), "localhost", "127.0.0.1"] if is_loopback(bound[0]) else [host.lower()]
    shown = "" if port in (None, 443 if scheme == "https" else 80) else f":{port}"  # browsers leave the usual one out
    named = [f"[{name}]{shown}" if ":" in name else f"{name}{shown}" for name in names]
    return f"{scheme}://{named[0]}", named


def _address(given: str) -> tuple[str, str, int | None]:
    """Scheme, host and port."""
    try:
        parts = urlsplit(given)
        name, port = parts.hostname, parts.port
    except ValueError:
        name = port = None
    more = name and (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc)
    if not name or more or parts.scheme not in ("http", "https"):
        raise InputError(f"--address: found {given!r}; expected only such as https://study.example.org:8443")
    return parts.scheme, name, port


def is_encrypted(bound: str, address: str, *, tls: bool) -> bool:
    """Whether nothing goes over a network unencrypted, as far as we can tell: neither to the address nor to us."""
    parts = urlsplit(address)
    return (tls or is_loopback(bound)) and (parts.scheme == "https" or is_loopback(parts.hostname or ""))


def check_certificate(cert: Path | None, key: Path | None) -> None:
    """Raises `InputError` where these are no certificate and its key."""
    if (cert is None) != (key is None):
        raise InputError("--tls-cert, --tls-key: found one of them; expected both or none")
    try:
        if cert is not None:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except OSError as error:
        raise InputError(f"--tls-cert, --tls-key: found no usable pair ({error}); expected PEM files") from error


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
    uvicorn.Server(config).run(sockets=[listening])
