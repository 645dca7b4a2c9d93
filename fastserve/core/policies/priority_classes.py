"""Priority classes: one inner policy per user `priority`, lower values first.

Every request belongs to the class it asked for, clamped to ±100. One that has not run for
`aging_s` seconds is lifted by one class at a time until it runs, and stays there until it has had
`quantum_s` of steps; then it returns to its own class. So no class waits for ever: with c classes
above it, a request stands in the first one within c · aging_s of its last step, and from then on
waits no longer than the inner policy lets one wait that has come when it did.
To move between classes is not to end: what the inner policy knows of a request goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from fastserve.core.messages import Forecasts
from fastserve.core.policies.parts import Deadlines
from fastserve.core.policies.protocol import (
    ClassPolicy,
    Coldness,
    Levels,
    LevelStats,
    Predictions,
)
from fastserve.core.request import FinishReason, Request

MAX_PRIORITY = 100


class _Lift(NamedTuple):
    """When a request was last lifted, and the `attained_s` with which it goes home."""

    lifted_at: float
    until_s: float


class PriorityClasses:
    """Strict order between classes, the inner policy's within one."""

    def __init__(
        self, make_policy: Callable[[], ClassPolicy], aging_s: float, quantum_s: float
    ) -> None:
        """`make_policy` makes the policy of one class.

        What the classes are to learn together it hands to each of them.
        """
        self._make_policy = make_policy
        self._aging_s = aging_s
        self._quantum_s = quantum_s
        self._spare: ClassPolicy | None = make_policy()  # of the first class that is asked for
        self.reservation = self._spare.reservation
        self._has_levels = self._spare.levels is not None
        self._has_predictions = self._spare.predictions is not None
        self._classes: dict[int, ClassPolicy] = {}
        self._ranks: list[int] = []
        self._class_of: dict[int, int] = {}
        self._members: dict[int, Request] = {}
        self._deadlines = Deadlines()
        self._lifts: dict[int, _Lift] = {}

    @property
    def levels(self) -> Levels | None:
        """The levels of all classes together, if the inner policy has any."""
        return self if self._has_levels else None

    @property
    def predictions(self) -> Predictions | None:
        """The predictions of all classes together, if the inner policy makes any."""
        if not self._has_predictions:
            return None
        return self._classes[self._ranks[0]].predictions if len(self._ranks) == 1 else self

    def admit(self, request: Request, now: float) -> None:
        """Join the class of the request's priority."""
        rank = self._own_class(request)
        inner = self._class(rank, now)
        self._members[request.handle] = request
        self._class_of[request.handle] = rank
        inner.admit(request, now)
        if len(self._ranks) > 1:
            self._deadlines.put(request.handle, now + self._aging_s)

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Tell each class of its members, and send those home that have had their quantum."""
        if len(self._ranks) == 1:
            self._classes[self._ranks[0]].ran(requests, now)
            return
        parts: dict[int, list[Request]] = {}
        for request in requests:
            parts.setdefault(self._class_of[request.handle], []).append(request)
        for rank, members in parts.items():
            self._classes[rank].ran(members, now)
        if not self._lifts:
            return
        for request in requests:
            lift = self._lifts.get(request.handle)
            if lift is not None and request.attained_s >= lift.until_s:
                del self._lifts[request.handle]
                self._move(request, self._own_class(request))
                self._deadlines.put(request.handle, now + self._aging_s)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave the class."""
        self._classes[self._class_of.pop(request.handle)].finished(request, reason)
        del self._members[request.handle]
        self._deadlines.discard(request.handle)
        self._lifts.pop(request.handle, None)

    def advance(self, now: float) -> None:
        """Lift those that have waited for `aging_s`, then let time act within each class."""
        if len(self._ranks) > 1:
            self._lift_waiting(now)
        for inner in self._classes.values():
            inner.advance(now)

    def next_event(self, now: float) -> float:
        """Return the earliest time at which a class changes, or a request might be lifted."""
        inner = (policy.next_event(now) for policy in self._classes.values())
        return min((self._deadlines.first()[0], *inner))

    def ordered(self) -> Iterator[Request]:
        """Yield class by class."""
        if len(self._ranks) == 1:
            return self._classes[self._ranks[0]].ordered()
        return chain.from_iterable(self._classes[rank].ordered() for rank in self._ranks)

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the class, then the inner order: all of a class are warmer than the next one."""
        rank = self._class_of[request.handle]
        inner = self._classes[rank].coldness(request, now)
        return inner if len(self._ranks) == 1 else (rank, *inner)

    def estimated_next_schedule_time(self, request: Request, now: float) -> float | None:
        """Return the inner estimate; None behind other classes, which may never become empty."""
        rank = self._class_of[request.handle]
        for above in self._ranks[: self._ranks.index(rank)]:
            if next(self._classes[above].ordered(), None) is not None:
                return None
        return self._classes[rank].estimated_next_schedule_time(request, now)

    def level(self, request: Request) -> int:
        """Return the level within the class."""
        levels = self._classes[self._class_of[request.handle]].levels
        assert levels is not None
        return levels.level(request)

    def stats(self) -> LevelStats:
        """Return the sums over the classes."""
        sizes: dict[int, int] = {}
        num_demotions = num_promotions = 0
        for policy in self._classes.values():
            assert policy.levels is not None
            part = policy.levels.stats()
            num_demotions += part.num_demotions
            num_promotions += part.num_promotions
            for level, size in part.requests_by_level.items():
                sizes[level] = sizes.get(level, 0) + size
        return LevelStats(num_demotions, num_promotions, sizes)

    def predicted_output_tokens(self, request: Request) -> float:
        """Return what the class that a request is in expected."""
        predictions = self._classes[self._class_of[request.handle]].predictions
        assert predictions is not None
        return predictions.predicted_output_tokens(request)

    def expected_work(self) -> Iterator[tuple[float, int]]:
        """Yield what each class expects."""
        for policy in self._classes.values():
            assert policy.predictions is not None
            yield from policy.predictions.expected_work()

    def forecasts(self) -> Forecasts:
        """Return those of any class: what they predict they learn together."""
        policy = next(iter(self._classes.values()), self._spare)
        assert policy is not None
        assert policy.predictions is not None
        return policy.predictions.forecasts()

    @staticmethod
    def _own_class(request: Request) -> int:
        return max(-MAX_PRIORITY, min(MAX_PRIORITY, request.priority))

    def _class(self, rank: int, now: float) -> ClassPolicy:
        """Return the policy of a class, which may be its first."""
        if rank not in self._classes:
            self._classes[rank] = self._spare or self._make_policy()
            self._spare = None
            self._ranks = sorted(self._classes)
            if len(self._ranks) == 2:
                self._begin_aging(now)
        return self._classes[rank]

    def _move(self, request: Request, rank: int) -> None:
        before = self._classes[self._class_of[request.handle]]
        self._class_of[request.handle] = rank
        before.move(request, self._classes[rank])

    def _begin_aging(self, now: float) -> None:
        """Watch the requests that came while there was nothing above or below them."""
        for handle in self._members:
            self._deadlines.put(handle, now + self._aging_s)

    def _lift_waiting(self, now: float) -> None:
        """Lift by one class each that has waited for `aging_s` in its present one."""
        looked_at: list[int] = []
        while (entry := self._deadlines.pop(now)) is not None:
            _, handle = entry
            request, lift = self._members[handle], self._lifts.get(handle)
            waits_since = request.last_ran_at
            if lift is not None:
                waits_since = max(waits_since, lift.lifted_at)
            waits_until = waits_since + self._aging_s
            if waits_until > now:
                self._deadlines.put(handle, waits_until)
                continue
            looked_at.append(handle)
            position = self._ranks.index(self._class_of[handle])
            if position > 0 and not request.steps_in_flight:
                until_s = request.attained_s + self._quantum_s if lift is None else lift.until_s
                self._lifts[handle] = _Lift(now, until_s)
                self._move(request, self._ranks[position - 1])
        for handle in looked_at:
            self._deadlines.put(handle, now + self._aging_s)
