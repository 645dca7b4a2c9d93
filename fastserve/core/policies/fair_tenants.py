"""Fair shares: one inner policy per tenant, and who has had less of the machine goes first.

The virtual token counter (VTC, arXiv 2401.00588) where requests are preempted at every token. Each
tenant has a counter of what its requests have been given, a token by what it takes of a full batch,
in machine seconds. An order gives out seats one by one, each to the tenant with the least counter,
which the seat raises by `BURST_S` over all seats: equal counters share the seats equally, and one
who is `BURST_S` behind has them all. What a tenant does not use others do, and it may catch up on
`BURST_S` of it. So of two tenants that both wait, neither gets more than the other by much more
than `BURST_S`, over however long a time, whatever each of them sends.
Rules: one tenant alone is the inner policy. Of what is computed anew nothing is counted twice, nor
what was cached at all. Must not know: how a tenant's own requests are ordered, who tenants are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import Forecasts
from fastserve.core.policies.protocol import ClassPolicy, Coldness, Predictions
from fastserve.core.request import FinishReason, Request

BURST_S = 1.0  # machine seconds that an idle tenant is behind the one that has had most


class ServiceCounters:
    """What each tenant has been given, in machine seconds; shared by all priority classes."""

    def __init__(self, cost_model: CostModel, num_seats: int) -> None:
        self._cost_model = cost_model
        self._seat_token_s = cost_model.decode_share_s(num_seats, 0.0)
        self._given_s: dict[str, float] = {}
        self._most_s = 0.0
        self._num_counted: dict[int, int] = {}  # tokens of each live request

    def given_s(self, tenant: str) -> float:
        """Return a tenant's counter."""
        return max(self._given_s.get(tenant, 0.0), self._most_s - BURST_S)

    def began(self, request: Request) -> None:
        """Count a request from here on."""
        self._num_counted[request.handle] = 0

    def ran(self, request: Request) -> None:
        """Count what a request has computed since it was last counted."""
        start = max(self._num_counted[request.handle], request.num_cached_tokens)
        num_tokens = request.num_computed_tokens - start
        if num_tokens <= 0:
            return
        self._num_counted[request.handle] = request.num_computed_tokens
        costs = self._cost_model
        if num_tokens == 1:
            added_s = self._seat_token_s + costs.decode_context_s * (start + 1)
        else:
            added_s = costs.added_prefill_s(num_tokens, start)
        given_s = self._given_s[request.tenant] = self.given_s(request.tenant) + added_s
        self._most_s = max(self._most_s, given_s)

    def ended(self, request: Request) -> None:
        """Count the last of a request."""
        self.ran(request)
        del self._num_counted[request.handle]


class FairTenants:
    """Tenants by what they have been given, the inner policy's order within each."""

    levels = None

    def __init__(
        self, make_policy: Callable[[], ClassPolicy], counters: ServiceCounters, num_seats: int
    ) -> None:
        """`make_policy` makes the policy of one tenant, which has no levels.

        What tenants are to learn together it hands to each of them.
        """
        self._make_policy = make_policy
        self._counters = counters
        self._num_seats = num_seats
        self._spare = make_policy()  # of the next tenant that comes
        assert self._spare.levels is None
        self.reservation = self._spare.reservation
        self._tenants: dict[str, ClassPolicy] = {}  # those that have live requests
        self._num_live: dict[str, int] = {}
        self._places: dict[int, int] | None = None  # in the order, of its head; None: not known

    @property
    def predictions(self) -> Predictions | None:
        """The predictions of all tenants together, if the inner policy makes any."""
        return None if self._spare.predictions is None else self

    def admit(self, request: Request, now: float) -> None:
        """Join the requests of the tenant."""
        self._counters.began(request)
        self._enter(request.tenant).admit(request, now)

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Count what each has been given, and tell each tenant's policy."""
        self._places = None
        for request in requests:
            self._counters.ran(request)
        if len(self._tenants) == 1:
            (only,) = self._tenants.values()
            only.ran(requests, now)
            return
        parts: dict[str, list[Request]] = {}
        for request in requests:
            parts.setdefault(request.tenant, []).append(request)
        for tenant, own in parts.items():
            self._tenants[tenant].ran(own, now)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave; the counter of the tenant stays."""
        self._counters.ended(request)
        self._tenants[request.tenant].finished(request, reason)
        self._left(request.tenant)

    def move(self, request: Request, to: FairTenants) -> None:
        """Leave for the same tenant's place in another, which shares the counters."""
        self._tenants[request.tenant].move(request, to._enter(request.tenant))
        self._left(request.tenant)

    def advance(self, now: float) -> None:
        """Let time act within each tenant."""
        self._places = None
        for policy in self._tenants.values():
            policy.advance(now)

    def next_event(self, now: float) -> float:
        """Return the earliest time at which the order within a tenant changes."""
        return min(
            (policy.next_event(now) for policy in self._tenants.values()), default=float("inf")
        )

    def ordered(self) -> Iterator[Request]:
        """Yield seat by seat, each time of the tenant with the least counter."""
        if len(self._tenants) == 1:
            (only,) = self._tenants.values()
            return only.ordered()
        return self._shared_out()

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the place in the order; behind its head, by tenants and then within each."""
        inner = self._tenants[request.tenant].coldness(request, now)
        if len(self._tenants) == 1:
            return inner
        if self._places is None:
            head = islice(self._shared_out(), self._num_seats)
            self._places = {warm.handle: place for place, warm in enumerate(head)}
        place = self._places.get(request.handle)
        if place is not None:
            return (place,)
        return (self._num_seats, self._counters.given_s(request.tenant), *inner)

    def estimated_next_schedule_time(self, request: Request, now: float) -> None:
        """Nothing tells what other tenants will be given until then."""

    def predicted_output_tokens(self, request: Request) -> float:
        """Return what the policy of its tenant expected."""
        return self._predictions_of(self._tenants[request.tenant]).predicted_output_tokens(request)

    def expected_work(self) -> Iterator[tuple[float, int]]:
        """Yield what is expected of each tenant."""
        for policy in self._tenants.values():
            yield from self._predictions_of(policy).expected_work()

    def forecasts(self) -> Forecasts:
        """Return those of any tenant: what they predict they learn together."""
        return self._predictions_of(self._spare).forecasts()

    @staticmethod
    def _predictions_of(policy: ClassPolicy) -> Predictions:
        assert policy.predictions is not None
        return policy.predictions

    def _enter(self, tenant: str) -> ClassPolicy:
        """Return the policy of a tenant, to which a request will come."""
        self._places = None
        if tenant not in self._tenants:
            self._tenants[tenant], self._spare = self._spare, self._make_policy()
            self._num_live[tenant] = 0
        self._num_live[tenant] += 1
        return self._tenants[tenant]

    def _left(self, tenant: str) -> None:
        self._places = None
        self._num_live[tenant] -= 1
        if not self._num_live[tenant]:
            del self._num_live[tenant], self._tenants[tenant]

    def _shared_out(self) -> Iterator[Request]:
        seat_s = BURST_S / self._num_seats
        heads: list[tuple[float, str, Request, Iterator[Request]]] = []
        for tenant, policy in self._tenants.items():
            behind = policy.ordered()
            head = next(behind, None)
            if head is not None:
                heads.append((self._counters.given_s(tenant), tenant, head, behind))
        heapq.heapify(heads)
        while heads:
            given_s, tenant, request, behind = heads[0]
            yield request
            following = next(behind, None)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (given_s + seat_s, tenant, following, behind))
