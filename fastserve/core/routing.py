"""Which of several equal engines a request goes to: where the least work is expected.

Work is in machine seconds: the prefill of what is not cached, and the tokens that are still
expected of an answer at what each costs in a full batch. A replica that has seen the beginning of
a prompt computes less of it, so affinity to prefixes is a part of that sum, and no rule beside it.
What is outstanding falls as tokens come; how long answers are is learned from those that ended.
Rules: a replica that is not open is never chosen. Equal ones take turns: the one that was given
fewer requests is next. With a single replica there is nothing to choose, and nothing is kept.
Must not know: time, processes, what a replica does with its requests.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from fastserve.core.cost_model import CostModel
from fastserve.core.gittins import AnswerLength
from fastserve.core.lengths import EDGES, Labels, LengthModel, bin_of, labels_of
from fastserve.core.outlook import Outlook
from fastserve.core.request import NO_HANDLE, Arrival, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFacts:
    """What a replica costs and holds; `num_cached_blocks` is 0 where no prefix is shared."""

    cost_model: CostModel
    max_num_seqs: int
    max_request_tokens: int
    block_size: int
    num_kv_tokens: int
    num_cached_blocks: int


class Beginnings:
    """The prompt blocks that a replica has seen, as long as it may still hold them."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._seen: dict[bytes, None] = {}  # by their latest use, oldest first

    def __len__(self) -> int:
        return len(self._seen)

    def num_known(self, hashes: Sequence[bytes]) -> int:
        """Return how many blocks at the beginning of a chain were seen."""
        return sum(1 for _ in takewhile(self._seen.__contains__, hashes))

    def add(self, hashes: Sequence[bytes]) -> None:
        """Note the use of a chain; its first blocks outlast the others, as in the pool."""
        seen = self._seen
        for block in reversed(hashes):
            seen.pop(block, None)
            seen[block] = None
        while len(seen) > self._num_blocks:
            del seen[next(iter(seen))]


@dataclass(slots=True, eq=False, kw_only=True)
class _Placed:
    """A request where it was placed, and the work that is expected of it still."""

    request: Request
    replica: _Replica
    labels: Labels
    known: Labels  # those of the labels that told something when it came
    max_tokens: int | None
    predicted: AnswerLength
    num_output_tokens: int
    prefill_s: float
    token_s: float
    work_s: float = 0.0
    next_num_tokens: int = 0  # of output, at which the work is to be estimated anew


@dataclass(slots=True, eq=False)
class _Replica:
    """One engine as the router sees it."""

    facts: ReplicaFacts
    beginnings: Beginnings
    work_s: float = 0.0
    placed: dict[int, _Placed] = field(default_factory=dict)


class Router:
    """Places requests, named by numbers of the caller's, on replicas 0, 1, …"""

    def __init__(self, num_replicas: int) -> None:
        """All replicas are closed at first."""
        self._replicas: list[_Replica | None] = [None] * num_replicas
        self._num_given = [0] * num_replicas
        self._placed: dict[int, _Placed] = {}
        self._outlook = Outlook(LengthModel(), latency_objective=0.0)

    def open(self, replica: int, facts: ReplicaFacts) -> None:
        """Let a replica take requests; it has none, and no KV."""
        self.close(replica)
        self._replicas[replica] = _Replica(facts, Beginnings(facts.num_cached_blocks))

    def close(self, replica: int) -> None:
        """Let a replica take no more requests; those that it had are placed nowhere."""
        closed, self._replicas[replica] = self._replicas[replica], None
        if closed is not None:
            for number in closed.placed:
                del self._placed[number]

    def outstanding_s(self, replica: int) -> float:
        """Return the machine seconds expected of all requests of a replica; 0 if it is closed."""
        found = self._replicas[replica]
        return 0.0 if found is None else found.work_s

    def route(
        self, number: int, arrival: Arrival, among: Container[int] | None = None
    ) -> int | None:
        """Place a request, which is placed nowhere yet, and return where.

        Only replicas in `among` are considered, if it is given; None where none of them is open.
        """
        open_ones = [
            (index, replica)
            for index, replica in enumerate(self._replicas)
            if replica is not None and (among is None or index in among)
        ]
        if not open_ones:
            return None
        if len(self._replicas) == 1:
            return 0
        best: tuple[float, int, int] | None = None
        chosen: _Placed | None = None
        describe = self._described(arrival, open_ones[0][1].facts)
        for index, replica in open_ones:
            placed = self._at(replica, *describe)
            rank = (replica.work_s + placed.work_s, self._num_given[index], index)
            if best is None or rank < best:
                best, chosen = rank, placed
        assert best is not None
        assert chosen is not None
        self._put(number, chosen)
        self._num_given[best[2]] += 1
        return best[2]

    def grew(self, number: int, num_output_tokens: int) -> None:
        """Take note of how long the answer to a request is by now."""
        placed = self._placed.get(number)
        if placed is not None and num_output_tokens >= placed.next_num_tokens:
            placed.num_output_tokens = num_output_tokens
            placed.prefill_s = 0.0
            before = placed.work_s
            self._estimate(placed)
            placed.replica.work_s += placed.work_s - before

    def ended(
        self, number: int, num_output_tokens: int, output_token_ids: Sequence[int] = ()
    ) -> None:
        """Let a request go, and learn how long its answer became.

        The ids, where they are known, are what another prompt may go on from.
        """
        placed = self._leave(number)
        if placed is None:
            return
        if num_output_tokens:
            self._outlook.ended(placed.labels, num_output_tokens, placed.predicted)
        request = placed.request
        for token_id in output_token_ids[request.num_output_tokens :]:
            request.append(token_id)
        facts = placed.replica.facts
        placed.replica.beginnings.add(_chain(request, facts))

    def failed(self, number: int) -> None:
        """Let a request go of which nothing can be learned."""
        self._leave(number)

    # ── what a request would cost ────────────────────────────────────────────────────────────

    def _described(self, arrival: Arrival, facts: ReplicaFacts) -> tuple[Request, Labels, Labels]:
        """Return a request, what is known of its answer, and what of that tells anything."""
        outlook = self._outlook
        num_tokens = len(arrival.prompt_token_ids)
        outlook.arrived(num_tokens)
        if outlook.is_due:
            outlook.renew()
        window = facts.max_request_tokens
        limit = arrival.params.max_tokens or max(window - num_tokens, 1)
        request = Request(NO_HANDLE, arrival, max_output_tokens=limit)
        labels = labels_of(request, window, facts.block_size) if num_tokens else ()
        return request, labels, outlook.model.telling(labels)

    def _at(self, replica: _Replica, request: Request, labels: Labels, known: Labels) -> _Placed:
        """Return a request as it would stand with a replica."""
        facts, outlook = replica.facts, self._outlook
        num_prompt_tokens, num_tokens = request.num_prompt_tokens, request.num_tokens
        limit = request.max_num_tokens
        bounded = limit < facts.max_request_tokens
        max_tokens = EDGES[bin_of(max(limit - num_prompt_tokens, 1))] if bounded else None
        num_cached = 0
        if len(replica.beginnings):
            num_known = replica.beginnings.num_known(_chain(request, facts))
            num_cached = max(min(num_known * facts.block_size, num_tokens - 1), 0)
        placed = _Placed(
            request=request,
            replica=replica,
            labels=labels,
            known=known,
            max_tokens=max_tokens,
            predicted=outlook.answer(known, max_tokens),
            num_output_tokens=request.num_output_tokens,
            prefill_s=facts.cost_model.added_prefill_s(num_tokens - num_cached, num_cached),
            token_s=facts.cost_model.seat_token_s(
                num_prompt_tokens + outlook.mean_tokens / 2,
                outlook.mean_prompt_tokens + outlook.mean_tokens / 2,
                num_seats=facts.max_num_seqs,
                num_kv_tokens=facts.num_kv_tokens,
            ),
        )
        self._estimate(placed)
        return placed

    def _estimate(self, placed: _Placed) -> None:
        """Say what is expected of a request, given how much of its answer there is."""
        answer = self._outlook.answer(placed.known, placed.max_tokens)
        index = answer.bin_at(placed.num_output_tokens)
        placed.work_s = placed.prefill_s + placed.token_s * answer.tokens_left(index)
        # The first token ends the prefill, whichever bin it falls into.
        has_begun = placed.prefill_s == 0.0
        placed.next_num_tokens = answer.end_of(index) if has_begun else placed.num_output_tokens + 1

    # ── where a request stands ───────────────────────────────────────────────────────────────

    def _put(self, number: int, placed: _Placed) -> None:
        replica = placed.replica
        replica.placed[number] = self._placed[number] = placed
        replica.work_s += placed.work_s
        replica.beginnings.add(_chain(placed.request, replica.facts))

    def _leave(self, number: int) -> _Placed | None:
        placed = self._placed.pop(number, None)
        if placed is not None:
            replica = placed.replica
            del replica.placed[number]
            # An idle replica is exactly that, whatever the sums have lost to rounding.
            replica.work_s = replica.work_s - placed.work_s if replica.placed else 0.0
        return placed


def _chain(request: Request, facts: ReplicaFacts) -> Sequence[bytes]:
    """Return the hashes of the full blocks of all ids known; none where no prefix is shared."""
    num_full = min(request.num_tokens // facts.block_size, facts.num_cached_blocks)
    if not num_full:
        return ()
    request.block_hash(num_full - 1, facts.block_size)
    return request.block_hashes[:num_full]
