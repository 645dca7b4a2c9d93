"""The settings of the HTTP server.

Rules: frozen, resolved once. Must not know: torch, the model's files, the machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastserve.settings.option import ConfigError, check_ranges, option

KEY_VARIABLE = "FASTSERVE_API_KEY"  # of the environment: one key, or several between blanks
ENGINE_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP face."""

    host: str = option("127.0.0.1", "address to bind")
    port: int = option(8000, "port to bind; 0 picks a free one", minimum=0, maximum=65535)
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names by which clients may call the server besides this machine's own; *.NAME: all below "
        "it, *: any (any where --host can be reached from other machines)",
    )
    api_key: tuple[str, ...] = option(
        (),
        "bearer tokens, one of which requests must carry; other users of this machine see these, "
        "and not those of --api-key-file or of the variable FASTSERVE_API_KEY",
    )
    api_key_file: str | None = option(None, "file with more such tokens, one a line")
    served_model_name: tuple[str, ...] = option(
        (), "model names that clients use; answers bear the first"
    )
    allowed_origins: tuple[str, ...] = option(
        (), "origins whose pages may call from a browser; *: all (none may)"
    )
    allowed_methods: tuple[str, ...] = option((), "methods that those pages may use (all)")
    allowed_headers: tuple[str, ...] = option((), "headers that those pages may send (all)")
    allow_credentials: bool = option(False, "let those pages send cookies")
    chat_template: str | None = option(None, "file with a Jinja chat template")
    enable_priority: bool = option(
        False, "let requests say their `priority`, and go before those of a higher number"
    )
    max_queued_requests: int = option(
        10_000, "requests in the server beyond which new ones get 429", minimum=1
    )
    max_request_price: int = option(
        2**22,
        "most tokens, of all choices with their prompts, that a request may ask for; each counts "
        "once more for every alternative to it that is scored. More gets 400",
        minimum=1,
    )
    max_body_bytes: int = option(4 * 2**20, "largest request body; more gets 413", minimum=1024)
    request_timeout: float | None = option(
        None,
        "seconds after which an answer that is not complete is given up with 504; the header "
        "X-Request-Timeout may ask for fewer (none)",
        minimum=0.001,
    )
    stream_grace: float = option(
        0.0,
        "seconds that a stream goes on, and is kept, for a client that lost it and may come back "
        "(0: it is aborted at once)",
        minimum=0,
        maximum=3600,
    )
    max_replay_bytes: int = option(
        256 * 2**20, "memory for what such streams have said", minimum=2**20
    )
    timeout_keep_alive: int = option(
        5, "seconds that a connection without a request stays open", minimum=1
    )
    engine_timeout: float = option(
        ENGINE_TIMEOUT_S,
        "seconds without a sign of life, or in a step beyond ten times what is expected of it, "
        "after which an engine is started again",
        minimum=0.5,
        maximum=1e6,
    )
    shutdown_timeout: float = option(
        25.0, "seconds that a stopping server lets answers go on", minimum=0.0, maximum=1e6
    )
    disable_log_requests: bool = option(False, "no line per request")
    log_level: str = option(
        "info",
        "least severe message that is logged",
        choices=("debug", "info", "warning", "error"),
    )

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)
        check_keys(self.api_key, "--api-key")


def check_keys(keys: Iterable[str], source: str) -> None:
    """Raise ConfigError for a key that no header can carry; the line does not repeat it."""
    for key in keys:
        if key != key.strip() or not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"{source}: a key that no header can carry; it must be printable ASCII, "
                "with no blank at either end"
            )
