"""The MLFQ of the paper's public artifact: it demotes by one level and promotes late.

It exists for comparison with the serving MLFQ, which it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fastserve.core.policies.mlfq import MLFQ
from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import ON_DEMAND
from fastserve.core.request import FinishReason, Request

QUANTUM_S = 0.010
QUANTUM_RATIO = 2.0
STARVATION_LIMIT = 3.0  # seconds
STEPS_BETWEEN_PROMOTIONS = 1000


class ArtifactMLFQ:
    """An MLFQ in which those that starve are looked for every so many steps only."""

    reservation = ON_DEMAND
    predictions = None

    def __init__(self, mlfq: MLFQ) -> None:
        """Take an MLFQ with the settings above, in which a request falls by `one_level`."""
        self.levels = mlfq
        self._num_steps_left = 0

    def admit(self, request: Request, now: float) -> None:
        """Join as in the MLFQ."""
        self.levels.admit(request, now)

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Demote as the MLFQ does, and count the step."""
        self._num_steps_left -= 1
        self.levels.ran(requests, now)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave the queues."""
        self.levels.finished(request, reason)

    def move(self, request: Request, to: ArtifactMLFQ) -> None:
        """Leave for the same level of the other."""
        self.levels.move(request, to.levels)

    def advance(self, now: float) -> None:
        """Promote those that starve when it is time to look for them."""
        if self._num_steps_left <= 0:
            self._num_steps_left = STEPS_BETWEEN_PROMOTIONS
            self.levels.advance(now)

    def next_event(self, now: float) -> float:
        """Return inf while steps have to pass before any is promoted."""
        return math.inf if self._num_steps_left > 0 else self.levels.next_event(now)

    def ordered(self) -> Iterator[Request]:
        """Yield level by level, first in first out."""
        return self.levels.ordered()

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the estimated next schedule time."""
        return self.levels.coldness(request, now)

    def estimated_next_schedule_time(self, request: Request, now: float) -> float:
        """Return the MLFQ's estimate, which knows nothing of late promotions."""
        return self.levels.estimated_next_schedule_time(request, now)
