"""Endpoint of a judge and its API key, which is read from the environment and stored nowhere."""

import os
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from mixpo.data.errors import InputError

KEY_VARIABLE = "OPENAI_API_KEY"
MIN_SECRET_LENGTH = 8
"""Shortest key that is removed from texts, in characters."""
EXPECTED = "expected http(s)://HOST[:PORT]/PATH, such as http://127.0.0.1:8000/v1"


def normalize_endpoint(endpoint: str) -> str:
    """Return an endpoint's URL without trailing slashes, after checking it.

    Raises `InputError` on an invalid URL, and on one with a user name, password, query or fragment.
    """
    try:
        parts = urlsplit(endpoint)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise InputError(f"--endpoint: found no address; {EXPECTED}") from None
    if "@" in parts.netloc:
        raise InputError(
            f"--endpoint: found a user name or password in it; {EXPECTED}; the key comes from {KEY_VARIABLE}"
        )
    if "?" in endpoint or "#" in endpoint:
        raise InputError(f"--endpoint: found a query in it; {EXPECTED}; the key comes from {KEY_VARIABLE}")
    if not is_valid or not (endpoint.isascii() and endpoint.isprintable()) or " " in endpoint:
        raise InputError(f"--endpoint: found {endpoint!r}; {EXPECTED}")
    return endpoint.rstrip("/")


def is_loopback_endpoint(endpoint: str) -> bool:
    """Return True if an endpoint's host is this machine."""
    host = urlsplit(endpoint).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def is_unencrypted_endpoint(endpoint: str) -> bool:
    """Return True if requests to an endpoint cross a network unencrypted: http to another machine."""
    return urlsplit(endpoint).scheme == "http" and not is_loopback_endpoint(endpoint)


def read_api_key() -> str:
    """Read OPENAI_API_KEY from the environment, empty if not set, since not every server needs one.

    Raises `InputError` on an invalid key, without showing it.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"{KEY_VARIABLE}: found a line break, a space or a character that no key has; "
            "expected the bare key (not shown here)"
        )
    return key


def make_key_redactor(api_key: str) -> Callable[[str], str]:
    """Make a function that hides the API key in a text, unless the key is too short to be secret."""
    return lambda text: text.replace(api_key, f"[{KEY_VARIABLE}]") if len(api_key) >= MIN_SECRET_LENGTH else text
