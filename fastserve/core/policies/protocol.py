"""What a scheduling policy is to the scheduler.

Rules: a policy orders; it never packs, evicts or plans. `advance` is the only place where time
changes an order, and `ordered` changes nothing, so that one may look ahead between plans. It may
read of a request what is known of it (id, arrival, prompt length, cached length, client, tenant,
priority, counters, `attained_s`, `last_ran_at`), never its true length, and writes none of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from fastserve.core.messages import Forecasts
from fastserve.core.policies.reservation import Reservation
from fastserve.core.request import FinishReason, Request

# An order without a unit: of two values of one moment the larger is the colder.
Coldness = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LevelStats:
    """Counters of a policy with levels."""

    num_demotions: int
    num_promotions: int
    requests_by_level: dict[int, int]


class Levels(Protocol):
    """What is reported of queues above one another; 0 is the highest."""

    def level(self, request: Request) -> int:
        """Return the level of a live request."""

    def stats(self) -> LevelStats:
        """Return counters, and the number of requests of each level that has any."""


class Predictions(Protocol):
    """What is reported where the lengths of answers are predicted."""

    def predicted_output_tokens(self, request: Request) -> float:
        """Return the length of a live request's answer that was expected when it came."""

    def expected_work(self) -> Iterator[tuple[float, int]]:
        """Yield how many machine seconds live requests are still expected to take, and how many do.

        Those that are alike come together.
        """

    def forecasts(self) -> Forecasts:
        """Return how predictions turned out, and the work in the system."""


class Policy(Protocol):
    """Orders the live requests, best first."""

    @property
    def reservation(self) -> Reservation:
        """What a request must be given to begin."""

    @property
    def levels(self) -> Levels | None:
        """The levels, where there are any."""

    @property
    def predictions(self) -> Predictions | None:
        """What is predicted of requests, where anything is."""

    def admit(self, request: Request, now: float) -> None:
        """Take a new request in."""

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Note that a step has ended; these took part in it and go on.

        Their counters, `attained_s` and `last_ran_at` include the step.
        """

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Let go of a request that has ended, for good.

        Its answer was as long as it became: to a queue it is the same whether a token, a limit or
        an abort ended it. Only one that failed says nothing about its length.
        """

    def advance(self, now: float) -> None:
        """Let time change the order; called before each plan."""

    def next_event(self, now: float) -> float:
        """Return a time before which time alone changes nothing; inf where it never will.

        A time that is not after `now`: the next `advance` will.
        """

    def ordered(self) -> Iterator[Request]:
        """Yield the live requests that may run, best first, lazily.

        The policy must not be changed while the iterator is in use.
        """

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return by which order requests lose their KV, the largest first.

        It need not be the order of `ordered`, but the requests at its head should be the warmest.
        """

    def estimated_next_schedule_time(self, request: Request, now: float) -> float | None:
        """Return the seconds until the request would run (paper §4.3, ENST); None: not known."""


class ClassPolicy(Policy, Protocol):
    """A policy that can order the requests of one priority class among several."""

    def move(self, request: Request, to: Self) -> None:
        """Hand a live request to another policy of this kind, with all that is known of it."""
