"""What a scheduling policy is to the scheduler.

Rules: a policy orders and accounts; it never packs, evicts or plans. It may read a request's id,
arrival, prompt length, cached length, client and priority, never its true length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fastserve.core.request import Request

# What one request computed in a step: its tokens; its counters already include them. A plain tuple:
# one is built per running request and step.
Share = tuple[Request, int]


class StepBill(NamedTuple):
    """A finished step: its device seconds and who took part and goes on."""

    device_s: float
    shares: Sequence[Share]


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """Counters of a policy."""

    num_demotions: int
    num_promotions: int
    requests_by_level: dict[int, int]


class Policy(Protocol):
    """Orders the live requests, best first.

    `keeps_order` says that a request which memory makes wait holds up those behind it, even where
    they would fit.
    """

    @property
    def keeps_order(self) -> bool:
        """Whether nobody may pass a request that waits for memory."""

    def admit(self, request: Request, now: float) -> None:
        """Take a new request in."""

    def charge(self, bill: StepBill, now: float) -> None:
        """Account for a finished step."""

    def remove(self, request: Request) -> None:
        """Let go of a request that has ended."""

    def ordered(self, now: float) -> Iterator[Request]:
        """Yield all live requests, best first, lazily.

        The policy must not be changed while the iterator is in use.
        """

    def estimated_next_schedule_time(self, request: Request, now: float) -> float:
        """Return the seconds until the request would run (paper §4.3, ENST); larger is colder.

        KV is taken from the request with the largest; it must not contradict `ordered`.
        """

    def reserve_tokens(self, request: Request) -> int:
        """Return the positions to hold blocks for from the start; 0: blocks on demand."""

    def level(self, request: Request) -> int:
        """Return the queue of a request, 0 = highest; 0 where there is only one."""

    def stats(self) -> PolicyStats:
        """Return counters."""
