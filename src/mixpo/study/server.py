"""HTTP server of a study: listening socket, base URL, TLS and uvicorn."""

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
    "warning: without TLS, links and judgements can be read on the network; "
    "expected --tls-cert and --tls-key, or --address with https:// where a proxy on this machine encrypts"
)


def open_listening_socket(host: str, port: int) -> socket.socket:
    """Open a listening TCP socket, on a free port if `port` is 0. Raises `InputError` where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host: found {host!r} ({error.strerror}); expected an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port: found {port} in use; expected a free port; 0 chooses one") from error
        raise InputError(
            f"--host, --port: found {host}:{port}, which cannot be opened ({error.strerror}); choose others"
        ) from error
    return listener


def is_loopback_host(host: str) -> bool:
    """Return True if a host name or address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build_base_url(
    host: str, bound: tuple[str, int], public_address: str | None, *, tls: bool
) -> tuple[str, list[str]]:
    """Return the base URL of the annotators' links, and the Host headers that requests may have.

    `bound` is the address and port of the socket for `host`. Raises `InputError` on an invalid or missing address.
    """
    if public_address is not None:
        scheme, name, port = _parse_address(public_address)
        names = [name]
    else:
        scheme, port = "https" if tls else "http", bound[1]
        if ipaddress.ip_address(bound[0]).is_unspecified:
            raise InputError(
                f"--host: found {host}, which is every address of this machine; expected also --address, the one "
                f"that annotators open, such as {scheme}://192.168.1.7:{port}"
            )
        names = [host.lower(), "localhost", "127.0.0.1"] if is_loopback_host(bound[0]) else [host.lower()]
    usual_port = 443 if scheme == "https" else 80  # which browsers leave out
    port_suffix = "" if port in (None, usual_port) else f":{port}"
    hosts = [f"[{name}]{port_suffix}" if ":" in name else f"{name}{port_suffix}" for name in names]
    return f"{scheme}://{hosts[0]}", hosts


def _parse_address(address: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port (None if not given) of a URL. Raises `InputError` if it has anything else."""
    try:
        parts = urlsplit(address)
        name, port = parts.hostname, parts.port
    except ValueError:
        name = port = None
    has_more = name and (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc)
    if not name or has_more or parts.scheme not in ("http", "https"):
        raise InputError(
            f"--address: found {address!r}; expected scheme, host and port alone, such as https://study.example.org:8443"
        )
    return parts.scheme, name, port


def is_traffic_encrypted(bound_host: str, public_address: str, *, tls: bool) -> bool:
    """Return True if no traffic crosses a network unencrypted, neither from annotators nor from a proxy."""
    parts = urlsplit(public_address)
    return (tls or is_loopback_host(bound_host)) and (parts.scheme == "https" or is_loopback_host(parts.hostname or ""))


def require_certificate(cert_file: Path | None, key_file: Path | None) -> None:
    """Raise `InputError` unless these files are a certificate and its key, or both None."""
    if (cert_file is None) != (key_file is None):
        raise InputError("--tls-cert, --tls-key: found one without the other; expected both or none")
    try:
        if cert_file is not None:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file)
    except OSError as error:
        raise InputError(f"--tls-cert, --tls-key: found no usable pair ({error}); expected PEM files") from error


def serve_app(app: ASGIApp, listener: socket.socket, cert_file: Path | None, key_file: Path | None) -> None:
    """Serve the app until Ctrl-C, without an access log: a link's address holds its token."""
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
        ssl_certfile=cert_file,
        ssl_keyfile=key_file,
    )
    uvicorn.Server(config).run(sockets=[listener])
