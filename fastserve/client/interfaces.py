"""What a server asks of an engine: the Protocols that routes and tests' engines fit by shape.

Rules: everything is called on one event loop; a request has exactly one end, which is a terminal
update, an error that its stream raises, or its abort.
Must not know: processes, sockets, HTTP, text, torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Sequence
from typing import Protocol

from fastserve.core.messages import RequestUpdate
from fastserve.core.request import Arrival
from fastserve.wire.engine_messages import EngineInfo


class EngineDeadError(RuntimeError):
    """There is no engine and there will be none again; the message is one line."""


class ShuttingDownError(RuntimeError):
    """The server stops before the request is finished; the message is one line."""


class UpdateStream(AsyncIterable[RequestUpdate], Protocol):
    """The updates of one request, to its end.

    Raises ValueError if the request can never run, RequestFailedError if it ends the engine it
    runs in, EngineDeadError if the engine is gone, and ShuttingDownError if it is let go first.
    """

    def finish(self, num_output_tokens: int) -> None:
        """Say that a stop string matched after so many ids; the terminal update follows."""

    def abort(self) -> None:
        """Give the request up; nothing more comes. Does nothing once it has ended."""


class ServerMetrics(Protocol):
    """What is counted of a server."""

    def asked(self, n: int) -> None:
        """See a prompt that `n` choices are wanted of."""

    def show(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Let a gauge of that name show a value of the server's own from now on."""

    def render(self) -> tuple[bytes, str]:
        """Return the exposition and its content type."""


class EngineClient(Protocol):
    """An engine as routes see it: its state, and a place to submit requests."""

    @property
    def metrics(self) -> ServerMetrics:
        """What is counted, to be rendered."""

    @property
    def info(self) -> EngineInfo | None:
        """What the engine is; None until it was loaded once."""

    @property
    def progress(self) -> tuple[str, float]:
        """What loading is at, and how much of that is done (0 to 1)."""

    @property
    def error(self) -> str | None:
        """Why the engine is gone for good, in one line; None while it is not."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are run at this moment; False while loading and while restarting."""

    @property
    def is_dead(self) -> bool:
        """Whether the engine is gone for good."""

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""

    def submit_choices(self, arrival: Arrival, n: int) -> Sequence[UpdateStream]:
        """Accept `n` choices of a prompt: `arrival` is the first (`SamplingParams.of_choice`).

        ValueError if its values cannot be sent, EngineDeadError if the engine is dead. That one
        can never run (no room for it) is found later: its stream then raises ValueError.
        """
