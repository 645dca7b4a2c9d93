"""The rows of a workload on their way through a simulation: when each is due, what became of it.

Rules: a row becomes a request when it is due, and ends once. Must not know: engines, what serves.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

from fastserve.core.messages import RequestMetrics, RequestUpdate
from fastserve.core.request import Arrival, SamplingParams
from fastserve.sim.workload import Floats, Workload


class Rows:
    """What is still to come, and what has ended."""

    def __init__(self, workload: Workload, block_size: int, *, is_closed_loop: bool) -> None:
        """With `is_closed_loop` a turn of a session comes `think_s` after the one before it."""
        self.workload = workload
        self.output_tokens: list[int] = workload.output_tokens.tolist()
        self.num_ended = 0
        self._block_size = block_size
        self._prompts = workload.prompts()
        self._params = self._sampling_params()
        self._clients = workload.client or ("",) * len(workload)
        self._tenants = workload.tenant or ("",) * len(workload)
        self._next_turns = workload.next_turns() if is_closed_loop else {}
        later = set(self._next_turns.values())
        self._due = [
            (at, row) for row, at in enumerate(workload.arrived_at.tolist()) if row not in later
        ]
        heapq.heapify(self._due)
        num_rows = len(workload)
        self._last_token_at = [math.inf] * num_rows
        self._max_gap_s = [0.0] * num_rows
        self._metrics: list[RequestMetrics | None] = [None] * num_rows

    def _sampling_params(self) -> list[SamplingParams]:
        """Return what each row asks for; equal ones are one object."""
        if self.workload.max_tokens is None:
            return [SamplingParams(max_tokens=None)] * len(self.workload)
        limits = self.workload.max_tokens.tolist()
        known = {limit: SamplingParams(max_tokens=limit) for limit in set(limits)}
        return [known[limit] for limit in limits]

    @property
    def next_due(self) -> float:
        """When the next row is due; inf where none will be, unless one that runs has to end."""
        return self._due[0][0] if self._due else math.inf

    def take_due(self, now: float) -> tuple[int, Arrival] | None:
        """Return the next row if it is due, as a request."""
        if self.next_due > now:
            return None
        due, row = heapq.heappop(self._due)
        return row, Arrival(
            self._prompts[row],
            self._params[row],
            age_s=now - due,
            block_hashes=self._prompts.block_hashes(row, self._block_size) or (),
            client=self._clients[row],
            tenant=self._tenants[row],
        )

    def take(self, row: int, update: RequestUpdate, now: float) -> None:
        """Note the news of a row."""
        gap_s = now - self._last_token_at[row]
        if gap_s > self._max_gap_s[row]:
            self._max_gap_s[row] = gap_s
        self._last_token_at[row] = now
        if update.metrics is not None:
            self._metrics[row] = update.metrics
            self.num_ended += 1
            following = self._next_turns.get(row)
            if following is not None:
                assert self.workload.think_s is not None
                think_s = float(self.workload.think_s[following])
                heapq.heappush(self._due, (now + think_s, following))

    def metrics(self) -> list[RequestMetrics]:
        """Return what the engine says of each row, all of which have ended."""
        ended = [metrics for metrics in self._metrics if metrics is not None]
        assert len(ended) == len(self._metrics), "a request has not ended"
        return ended

    @property
    def max_gap_s(self) -> Floats:
        """The longest pause between two tokens of each answer; NaN where there is one token."""
        is_one_token = self.workload.output_tokens == 1
        return np.where(is_one_token, np.nan, self._max_gap_s)
