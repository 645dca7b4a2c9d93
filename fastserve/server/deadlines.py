"""How long an answer may take: as long as the server lets any take, or less if its client says so.

Rules: counted from when the request's body has been read; what is not there by then is not waited
for, and whoever waits lets go of what makes it. Must not know: what is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from starlette.requests import Request

from fastserve.server.errors import ApiError, invalid

TIMEOUT_HEADER = "X-Request-Timeout"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deadline:
    """When an answer has to be complete; inf: whenever it is."""

    timeout_s: float = inf
    at: float = inf  # of the running loop's clock

    async def wait(self, work: Awaitable[T]) -> T:
        """Return what `work` does; 504 if it does not by then, and it is cancelled."""
        if self.at == inf:
            return await work
        try:
            async with asyncio.timeout_at(self.at) as limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ApiError(
                504,
                f"The answer was not complete within {self.timeout_s:g} s.",
                code="request_timeout",
            ) from error


def deadline_of(request: Request, limit_s: float | None) -> Deadline:
    """Return the deadline of a request that begins now; 400 for a header that says no time."""
    timeout_s = inf if limit_s is None else limit_s
    asked = request.headers.get(TIMEOUT_HEADER)
    if asked is not None:
        timeout_s = min(timeout_s, seconds(asked))
    return Deadline(timeout_s, asyncio.get_running_loop().time() + timeout_s)


def seconds(text: str) -> float:
    """Return what a header says."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < inf:
        raise invalid(f"{TIMEOUT_HEADER} must be a number of seconds above 0.", TIMEOUT_HEADER)
    return value
