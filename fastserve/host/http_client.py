"""The HTTP client of the verbs that ask a server: `top` and `bench serve`.

Rules: a server on this machine is asked directly, whatever proxy the environment names; what the
environment names wrongly is one line. Must not know: what is asked.
"""

from __future__ import annotations

import ipaddress
import ssl
from urllib.parse import urlsplit

import httpx

from fastserve.settings.option import ConfigError


def open_client(url: str, *, timeout_s: float, is_direct: bool = False) -> httpx.Client:
    """Return a client of the server at `url`.

    The environment's proxies are used unless the server is on this machine or `is_direct`. Raises
    ConfigError for an address that is none and for a proxy that cannot be used.
    """
    try:
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    if not host:
        raise ConfigError(f"{url!r} is not the address of a server")
    has_proxies = not is_direct and not is_loopback(host)
    try:
        # The trust of the ssl module, as of every other connection of this process.
        context = ssl.create_default_context()
        return httpx.Client(timeout=timeout_s, trust_env=has_proxies, verify=context)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"a proxy or certificates of the environment: {error}") from error


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost")
