"""Learned: by arrival, less a boost that is the larger the less work an answer is expected to be.

The boost is the γ-boost of the Gittins index (`pricing.py`): the key of a request is its arrival
less that. Nobody is overtaken by one that arrives more than b(G_min) later, G_min the least price
there is: so each wait is bounded, and no rule against starvation is needed.
Rules: keys change only where an answer has grown by two bins, a prefill goes on, or what
has been learned has changed by enough; that is spread over plans. Those that wait stand in lines of
their kind (`kinds.py`), those that have begun by keys of their own, and a stream whose KV is held
goes on after at most `max_pause_s` (`begun.py`). Must not know: true lengths, blocks, when a step
ends.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastserve.core.cost_model import CostModel
from fastserve.core.gittins import AnswerLength
from fastserve.core.lengths import Labels, labels_of
from fastserve.core.messages import Forecasts
from fastserve.core.outlook import Outlook
from fastserve.core.policies.begun import Begun
from fastserve.core.policies.kinds import Kind, Line, Lines
from fastserve.core.policies.pricing import Pricing
from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import ON_DEMAND_IN_ORDER, Reservation
from fastserve.core.request import FinishReason, Request

MAX_REFRESHES = 4  # of keys in one plan; none after the first that needs a new distribution


@dataclass(slots=True, eq=False)
class _Account:
    """What is known of a request; `line` is where it waits to begin, if it does."""

    request: Request
    labels: Labels
    kind: Kind
    predicted: AnswerLength  # when it came
    line: Line | None = None
    work_s: float = 0.0  # expected of it, once it has begun
    next_num_tokens: int = 0  # at which it is to be priced anew, prompt included


class Learned:
    """Requests by arrival − boost: lines of those that wait, beside those that have begun."""

    levels = None

    def __init__(
        self,
        cost_model: CostModel,
        outlook: Outlook,
        *,
        boost: float,
        max_pause_s: float,
        max_num_seqs: int,
        window: int,
        block_size: int,
        num_kv_tokens: int,
        spare_share: float,
    ) -> None:
        """`boost` is κ. The outlook may be shared by several policies.

        `window` is the longest request and `num_kv_tokens` what the device holds, in tokens.
        `spare_share` is that of the Reservation; there is none for κ = 0.
        """
        self.reservation = Reservation(spare_share=spare_share) if boost else ON_DEMAND_IN_ORDER
        self._outlook = outlook
        self._pricing = Pricing(
            cost_model,
            outlook,
            boost=boost,
            max_num_seqs=max_num_seqs,
            window=window,
            num_kv_tokens=num_kv_tokens,
        )
        self._window = window
        self._block_size = block_size
        self._accounts: dict[int, _Account] = {}
        self._lines = Lines()
        self._begun = Begun(max_pause_s if boost else math.inf)
        self._version = outlook.version
        self._stale: deque[Line | _Account] = deque()
        self._rising: deque[tuple[Line, float]] = deque()  # boosts that wait for all that are stale

    @property
    def predictions(self) -> Learned:
        """What is expected of requests."""
        return self

    def admit(self, request: Request, now: float) -> None:
        """Join the line of its kind; one that comes with a part of its answer has begun."""
        outlook = self._outlook
        outlook.arrived(request.num_prompt_tokens)
        labels = labels_of(request, self._window, self._block_size)
        kind = self._pricing.kind_of(request, outlook.model.telling(labels))
        account = _Account(request, labels, kind, self._pricing.answer(kind))
        self._accounts[request.handle] = account
        if request.num_output_tokens:
            self._price(account)
        else:
            self._wait(account)

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Price those anew that have begun, or whose answer has grown by enough."""
        accounts = self._accounts
        for request in requests:
            account = accounts[request.handle]
            if request.num_tokens >= account.next_num_tokens:
                self._leave_line(account)
                self._price(account)
        self._begun.ran(requests)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave, and let the length that the answer came to be learned."""
        account = self._accounts.pop(request.handle)
        if account.line is None:
            self._begun.take(request)
            self._outlook.expect(-account.work_s)
        else:
            self._leave_line(account)
        if reason is not FinishReason.ERROR and request.num_output_tokens:
            self._outlook.ended(account.labels, request.num_output_tokens, account.predicted)

    def move(self, request: Request, to: Learned) -> None:
        """Leave for the place by key in another, which shares the outlook."""
        account = self._accounts.pop(request.handle)
        to._accounts[request.handle] = account
        if account.line is None:
            to._begun.restore(request, self._begun.take(request))
        else:
            self._leave_line(account)
            to._wait(account)

    def advance(self, now: float) -> None:
        """Let streams that have paused too long go first, and bring some keys up to date."""
        self._begun.lift_paused(now)
        outlook, stale, rising = self._outlook, self._stale, self._rising
        if not stale and not rising:
            if outlook.is_due:
                outlook.renew()
            if self._version != outlook.version:
                self._version = outlook.version
                stale.extend(self._lines.lines())
                # In order of arrival.
                begun = sorted(request.handle for request in self._begun)
                stale.extend(self._accounts[handle] for handle in begun)
        num_made = outlook.num_made
        for _ in range(MAX_REFRESHES):
            if stale:
                self._refresh(stale.popleft())
            elif rising:
                line, boost_s = rising.popleft()
                if line.requests:
                    self._lines.boost(line, boost_s)
            if outlook.num_made > num_made:
                break

    def next_event(self, now: float) -> float:
        """Return the earliest time at which a stream may have paused too long.

        While keys wait to be made anew the next `advance` changes the order at any time.
        """
        if (
            self._stale
            or self._rising
            or self._outlook.is_due
            or self._version != self._outlook.version
        ):
            return -math.inf
        return self._begun.next_event()

    def ordered(self) -> Iterator[Request]:
        """Yield streams that have paused too long, then all by arrival − boost."""
        yield from self._begun.lifted()
        waiting = iter(self._lines)
        ahead = next(waiting, None)
        for keyed in self._begun.keyed():
            while ahead is not None and ahead < keyed:
                yield ahead[2]
                ahead = next(waiting, None)
            yield keyed[2]
        while ahead is not None:
            yield ahead[2]
            ahead = next(waiting, None)

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the key: arrival − boost."""
        account = self._accounts[request.handle]
        if account.line is not None:
            return (self._lines.key(account.line, request),)
        return (self._begun.key(request),)

    def estimated_next_schedule_time(self, request: Request, now: float) -> None:
        """The order is by price and arrival, not by the time until a request runs."""

    def predicted_output_tokens(self, request: Request) -> float:
        """Return the mean of the distribution that its answer had when it came."""
        return self._accounts[request.handle].predicted.tokens_left(0)

    def expected_work(self) -> Iterator[tuple[float, int]]:
        """Yield what is expected of lines and of those that have begun, as of their last price."""
        for line in self._lines.lines():
            yield line.work_s, len(line.requests)
        for request in self._begun:
            yield self._accounts[request.handle].work_s, 1

    def forecasts(self) -> Forecasts:
        """Return those of all that share the outlook."""
        return self._outlook.forecasts()

    # ── keys ─────────────────────────────────────────────────────────────────────────────────

    def _refresh(self, item: Line | _Account) -> None:
        """Bring a key up to date, but for a line whose boost grows.

        Those that have begun come first, lest one that waits overtakes all whose keys are old.
        """
        if isinstance(item, _Account):
            if self._accounts.get(item.request.handle) is item:
                self._price(item)
        elif item.requests:
            boost_s = self._price_line(item)
            if boost_s > item.boost_s:
                self._rising.append((item, boost_s))
            elif boost_s < item.boost_s:
                self._lines.boost(item, boost_s)

    def _price_line(self, line: Line) -> float:
        """Say what is expected of each in a line, and return the boost that it should have."""
        price = self._pricing.of_waiting(line.kind)
        self._outlook.expect(len(line.requests) * (price.work_s - line.work_s))
        line.work_s = price.work_s
        return price.boost_s

    def _price(self, account: _Account) -> None:
        """Give a request that has begun its key, and say what is expected of it."""
        request = account.request
        price = self._pricing.of_begun(request, account.kind)
        self._outlook.expect(price.work_s - account.work_s)
        account.work_s = price.work_s
        account.next_num_tokens = price.next_num_tokens
        self._begun.put(request, request.arrived_at - price.boost_s)

    # ── where a request stands ───────────────────────────────────────────────────────────────

    def _wait(self, account: _Account) -> None:
        """Join the end of the line of its kind."""
        line = self._lines.line(account.kind)
        is_new = line is None
        if line is None:
            line = Line(account.kind)
        account.line = line
        self._lines.join(line, account.request)
        self._outlook.expect(line.work_s)
        if is_new:
            self._lines.boost(line, self._price_line(line))

    def _leave_line(self, account: _Account) -> None:
        """Leave the line, where it stands in one."""
        line = account.line
        if line is not None:
            account.line = None
            self._lines.leave(line, account.request)
            self._outlook.expect(-line.work_s)
