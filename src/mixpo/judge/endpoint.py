"""Where a judge is asked, and the key for it, which stands in the environment and nowhere else."""

import os
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from mixpo.data.errors import InputError

KEY = "OPENAI_API_KEY"
SHORTEST_SECRET = 8
"""Characters of a key that is hidden."""
EXPECTED = "expected http(s)://HOST[:PORT]/PATH, such as http://127.0.0.1:8000/v1"


def checked(endpoint: str) -> str:
    """The same endpoint without slashes at its end. Raises `InputError` on no address, or one with more in it."""
    try:
        parts = urlsplit(endpoint)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise InputError(f"--endpoint: found no address; {EXPECTED}") from None
    if "@" in parts.netloc:
        raise InputError(f"--endpoint: found a user name or password in it; {EXPECTED}; the key comes from {KEY}")
    if "?" in endpoint or "#" in endpoint:
        raise InputError(f"--endpoint: found a query in it; {EXPECTED}; the key comes from {KEY}")
    if not named or not (endpoint.isascii() and endpoint.isprintable()) or " " in endpoint:
        raise InputError(f"--endpoint: found {endpoint!r}; {EXPECTED}")
    return endpoint.rstrip("/")


def is_loopback(endpoint: str) -> bool:
    """Whether an endpoint is on this machine."""
    host = urlsplit(endpoint).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def is_sent_in_clear(endpoint: str) -> bool:
    """Whether what is sent can be read between here and there."""
    return urlsplit(endpoint).scheme == "http" and not is_loopback(endpoint)


def key_in_environment() -> str:
    """The key, empty where none is set, since not every server needs one. Raises `InputError`, never showing it."""
    key = os.environ.get(KEY, "")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"{KEY}: found a line break, a space or a character that no key has; expected the bare key (not shown here)"
        )
    return key


def hider(key: str) -> Callable[[str], str]:
    """What takes a key out of a text; not one so short that it is no secret and may stand in any text."""
    return lambda text: text.replace(key, f"[{KEY}]") if len(key) >= SHORTEST_SECRET else text
