"""By which names requests may call this server: its own, so that no page can make up another.

A page may let a name of its own mean this machine's address ("DNS rebinding"); the browser then
takes an answer of ours for one of the page's, and only the Host header tells. Rules: the names of
this machine itself are always ours; where it is bound to them alone, no others are unless they are
given. Must not know: keys, routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from fastserve.host.http_client import is_loopback

ANY = "*"


class HostNames:
    """The names of a server bound to an address; `given` are more, `*.name` all below one."""

    def __init__(self, bound_to: str, given: Sequence[str]) -> None:
        names = [name.lower() for name in given]
        has_any = ANY in names or (not names and not is_loopback(bound_to))
        self._names = None if has_any else frozenset({bound_to.lower(), *names})
        self._domains = tuple(name[1:] for name in names if name.startswith("*."))

    def has(self, header: str | None) -> bool:
        """Whether a Host header names this server; no browser sends none."""
        if self._names is None or header is None:
            return True
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        return is_loopback(name) or name in self._names or name.endswith(self._domains or ANY)
