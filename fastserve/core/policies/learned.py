"""Learned: by arrival, less a boost that is the larger the less work an answer is expected to be.

Prompts are known and answers are predicted by what those before them came to (`core/lengths.py`).
The price of a request is its Gittins index G in machine seconds (`core/gittins.py`). Its key is
arrival − b(G) with b(x) = −ln(1 − e^(−γx)) / γ and 1/γ = κ · V (the γ-boost, arXiv 2404.08826),
where V is the mean work in the system that an arrival finds: what FCFS would make it wait. κ = 0
is FCFS, κ = ∞ the index alone. Nobody is overtaken by one that arrives more than b(G_min) later,
G_min the least price there is: so each wait is bounded, and no rule against starvation is needed.
Rules: keys change only where an answer has grown by two bins, a prefill goes on, or what
has been learned has changed by enough; that is spread over plans. One that has begun counts less
than its price, and a stream whose KV is held goes on after at most `max_pause_s`. Must not know:
true lengths, blocks, when a step ends.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from fastserve.core.cost_model import CostModel
from fastserve.core.gittins import AnswerLength
from fastserve.core.lengths import EDGES, Labels, bin_of, labels_of
from fastserve.core.messages import Forecasts
from fastserve.core.outlook import Outlook
from fastserve.core.policies.kinds import Kind, Line, Lines
from fastserve.core.policies.parts import Deadlines, SortedRequests
from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import ON_DEMAND_IN_ORDER, Reservation
from fastserve.core.request import FinishReason, Request

BEGUN_SHARE = 0.7  # of its price, for a request that has begun
NO_BOOST = 40.0  # prices in units of 1/γ from which on e^(−γx) is nothing beside 1
INDEX_ALONE = 1e6  # κ from which on arrivals decide between equal prices only
BINS_PER_PRICE = 2  # that an answer grows by before it is priced anew
MAX_REFRESHES = 4  # of keys in one plan; none after the first that needs a new distribution


@dataclass(slots=True, eq=False)
class _Account:
    """Where a request stands; `line` while it waits to begin, then its own `key`."""

    request: Request
    labels: Labels
    kind: Kind
    predicted: AnswerLength  # when it came
    line: Line | None = None
    key: float = 0.0
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
        self._cost_model = cost_model
        self._outlook = outlook
        self._boost = min(boost, INDEX_ALONE)
        self._max_pause_s = max_pause_s if boost else math.inf
        self._max_num_seqs = max_num_seqs
        self._window = window
        self._num_kv_tokens = num_kv_tokens
        self._block_size = block_size
        self._accounts: dict[int, _Account] = {}
        self._lines = Lines()
        self._begun: SortedRequests[float] = SortedRequests()
        self._lifted: dict[int, Request] = {}  # streams that have paused long enough
        self._deadlines = Deadlines()  # of streams; one that has run since is found when due
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
        kind = self._kind(request, outlook.model.telling(labels))
        account = _Account(request, labels, kind, outlook.answer(kind.labels, kind.max_tokens))
        self._accounts[request.handle] = account
        if request.num_output_tokens:
            self._begin(account)
        else:
            self._wait(account)

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Price those anew that have begun, or whose answer has grown by enough."""
        accounts, lifted = self._accounts, self._lifted
        for request in requests:
            account = accounts[request.handle]
            if request.num_tokens >= account.next_num_tokens:
                self._leave_line(account)
                self._begin(account)
        if lifted:
            for request in requests:
                if lifted.pop(request.handle, None) is not None:
                    self._begun.put(request, accounts[request.handle].key)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave, and let the length that the answer came to be learned."""
        account = self._leave(request)
        if reason is not FinishReason.ERROR and request.num_output_tokens:
            self._outlook.ended(account.labels, request.num_output_tokens, account.predicted)

    def move(self, request: Request, to: Learned) -> None:
        """Leave for the place by key in another, which shares the outlook."""
        due = self._deadlines.discard(request.handle)
        is_lifted = request.handle in self._lifted
        account = self._accounts[request.handle]
        key, work_s, has_begun = account.key, account.work_s, account.line is None
        to._accounts[request.handle] = self._leave(request)
        if not has_begun:
            to._wait(account)
            return
        account.work_s = work_s
        self._outlook.expect(work_s)
        to._begun.put(request, key)
        if is_lifted:
            to._lift(request)
        if due is not None:
            to._deadlines.put(request.handle, due)

    def advance(self, now: float) -> None:
        """Let streams that have paused too long go first, and bring some keys up to date."""
        self._lift_paused(now)
        outlook, stale, rising = self._outlook, self._stale, self._rising
        if not stale and not rising:
            if outlook.is_due:
                outlook.renew()
            if self._version != outlook.version:
                self._version = outlook.version
                stale.extend(self._lines.lines())
                stale.extend(self._begun_accounts())
        num_answers = outlook.num_answers
        for _ in range(MAX_REFRESHES):
            if stale:
                self._refresh(stale.popleft())
            elif rising:
                line, boost_s = rising.popleft()
                if line.requests:
                    self._lines.boost(line, boost_s)
            if outlook.num_answers > num_answers:
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
        return self._deadlines.first()[0]

    def ordered(self) -> Iterator[Request]:
        """Yield streams that have paused too long, then all by arrival − boost."""
        yield from self._lifted.values()
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
        return (-math.inf if request.handle in self._lifted else account.key,)

    def estimated_next_schedule_time(self, request: Request, now: float) -> None:
        """The order is by price and arrival, not by the time until a request runs."""

    def predicted_output_tokens(self, request: Request) -> float:
        """Return the mean of the distribution that its answer had when it came."""
        return self._accounts[request.handle].predicted.tokens_left(0)

    def expected_work(self) -> Iterator[tuple[float, int]]:
        """Yield what is expected of lines and of those that have begun, as of their last price."""
        for line in self._lines.lines():
            yield line.work_s, len(line.requests)
        for request in chain(self._begun, self._lifted.values()):
            yield self._accounts[request.handle].work_s, 1

    def forecasts(self) -> Forecasts:
        """Return those of all that share the outlook."""
        return self._outlook.forecasts()

    # ── what a request costs ─────────────────────────────────────────────────────────────────

    def _kind(self, request: Request, labels: Labels) -> Kind:
        limit = request.max_num_tokens
        return Kind(
            labels,
            EDGES[bin_of(limit - request.num_prompt_tokens)] if limit < self._window else None,
            _rounded(self._prefill_s(request)),
            _rounded(request.num_prompt_tokens),
        )

    def _prefill_s(self, request: Request) -> float:
        """Return the machine seconds of the tokens before the next sample."""
        start = request.num_cached_tokens if request.table is None else request.num_computed_tokens
        num_tokens = request.num_tokens - start
        return self._cost_model.added_prefill_s(num_tokens, start) if num_tokens > 1 else 0.0

    def _token_s(self, kind: Kind) -> float:
        """Return the machine seconds of a token of an answer, in the middle of a mean one."""
        outlook = self._outlook
        return self._cost_model.seat_token_s(
            kind.prompt_tokens + outlook.mean_tokens / 2,
            outlook.mean_prompt_tokens + outlook.mean_tokens / 2,
            num_seats=self._max_num_seqs,
            num_kv_tokens=self._num_kv_tokens,
        )

    def _boost_s(self, price_s: float) -> float:
        """Return how far a price moves a request ahead of its arrival."""
        return boost_s(price_s, self._boost * self._outlook.mean_work_s)

    def _begun_accounts(self) -> list[_Account]:
        """Return those that have a key of their own, in order of arrival."""
        begun = chain(self._begun, self._lifted.values())
        return [self._accounts[handle] for handle in sorted(request.handle for request in begun)]

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
        kind = line.kind
        answer = self._outlook.answer(kind.labels, kind.max_tokens)
        token_s = self._token_s(kind)
        work_s = kind.prefill_s + token_s * answer.tokens_left(0)
        self._outlook.expect(len(line.requests) * (work_s - line.work_s))
        line.work_s = work_s
        return self._boost_s(answer.index(0, kind.prefill_s, token_s))

    def _price(self, account: _Account) -> None:
        """Give a request that has begun its key, and say what is expected of it."""
        request, kind = account.request, account.kind
        answer = self._outlook.answer(kind.labels, kind.max_tokens)
        num_tokens = request.num_output_tokens
        index = answer.bin_at(num_tokens)
        prefill_s, token_s = self._prefill_s(request), self._token_s(kind)
        work_s = prefill_s + token_s * answer.tokens_left(index)
        self._outlook.expect(work_s - account.work_s)
        account.work_s = work_s
        # Each chunk of a prompt, and the first token, changes the price.
        account.next_num_tokens = 0
        if num_tokens:
            edge = answer.end_of(min(index + BINS_PER_PRICE, answer.num_bins) - 1)
            account.next_num_tokens = request.num_prompt_tokens + edge
        price_s = BEGUN_SHARE * answer.index(index, prefill_s, token_s)
        account.key = request.arrived_at - self._boost_s(price_s)
        if request.handle not in self._lifted:
            self._begun.put(request, account.key)

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

    def _begin(self, account: _Account) -> None:
        """Get a key of its own; a stream is watched from its first token on."""
        self._price(account)
        request = account.request
        if request.num_output_tokens and request.handle not in self._deadlines:
            self._deadlines.put(request.handle, request.last_ran_at + self._max_pause_s)

    def _leave_line(self, account: _Account) -> None:
        line = account.line
        if line is not None:
            account.line = None
            self._lines.leave(line, account.request)
            self._outlook.expect(-line.work_s)

    def _leave(self, request: Request) -> _Account:
        """Let go of a request and what is expected of it."""
        account = self._accounts.pop(request.handle)
        if account.line is not None:
            self._leave_line(account)
            return account
        if self._lifted.pop(request.handle, None) is None:
            self._begun.discard(request)
        self._deadlines.discard(request.handle)
        self._outlook.expect(-account.work_s)
        account.work_s = 0.0
        return account

    def _lift_paused(self, now: float) -> None:
        """Put the streams first that have not run for `max_pause_s`, until they have run once.

        One without KV is left where it is: to compute it all again for a token would cost others
        more than the pause costs it.
        """
        looked_at: list[tuple[int, float]] = []  # put back at the end: the limit may be no time
        while (entry := self._deadlines.pop(now)) is not None:
            handle = entry[1]
            request = self._accounts[handle].request
            due = request.last_ran_at + self._max_pause_s
            if due <= now:
                due = now + self._max_pause_s
                if request.table is not None and not request.steps_in_flight:
                    self._lift(request)
            looked_at.append((handle, due))
        for handle, due in looked_at:
            self._deadlines.put(handle, due)

    def _lift(self, request: Request) -> None:
        if request.handle not in self._lifted:
            self._begun.discard(request)
            self._lifted[request.handle] = request


def boost_s(price_s: float, scale_s: float) -> float:
    """Return b(G) = −ln(1 − e^(−γG)) / γ, 1/γ = `scale_s`; 0 where that is 0."""
    if price_s >= NO_BOOST * scale_s:
        return 0.0
    return -scale_s * math.log(-math.expm1(-price_s / scale_s))


def _rounded(value: float) -> float:
    """Return a value rounded to a power of 2^¼; 0 as it is."""
    return 2.0 ** (round(4.0 * math.log2(value)) / 4.0) if value else 0.0
