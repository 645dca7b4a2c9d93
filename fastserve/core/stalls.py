"""Stalls: what is done when nothing makes progress.

Rules: it should never happen. Under `is_strict` (tests, the simulator) a stall raises with the
story of every request; in serving the oldest request runs alone until it ends, and the stall is
counted. Must not know: why requests stand still.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastserve.core.accounts import Counters, level_of
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Handle, Request
from fastserve.settings.scheduler import SchedulerConfig


class StallError(RuntimeError):
    """Nothing can make progress; the message tells the story of every request."""


class Stalls:
    """Watches the live `requests`, oldest first; `alone` is the only one that may run."""

    def __init__(
        self,
        config: SchedulerConfig,
        requests: Mapping[Handle, Request],
        policy: Policy,
        counters: Counters,
    ) -> None:
        self.alone: Request | None = None
        self._is_strict = config.is_strict
        self._requests = requests
        self._policy = policy
        self._counters = counters
        self._num_steps = 0  # without progress, in a row
        self._max_steps = 1000 + 10 * -(-config.max_model_len // config.max_num_batched_tokens)

    def landed(self, has_progress: bool) -> None:
        """Note a step; without progress it computed nothing that had not been computed before."""
        if has_progress:
            self._num_steps = 0
            return
        self._num_steps += 1
        if self._num_steps > self._max_steps:
            self._num_steps = 0
            self.stalled("no new token")

    def stalled(self, why: str) -> None:
        """Let the oldest request run alone. Raises StallError if strict, or if one does already."""
        if self._is_strict or self.alone is not None:
            raise StallError(f"{why}: {self.story()}")
        self._counters.num_stalls += 1
        self.alone = next(iter(self._requests.values()), None)

    def ended(self, request: Request) -> None:
        """Let all run again if it was this one that ran alone."""
        if self.alone is request:
            self.alone = None

    def story(self) -> str:
        """Return what is known of each live request, in one line."""
        return "; ".join(
            f"request {r.handle}: computed {r.num_computed_tokens}/{r.num_tokens}, "
            f"in flight {r.steps_in_flight}, blocks {len(r.table.blocks) if r.table else 0}, "
            f"epoch {r.epoch}, level {level_of(self._policy, r)}"
            for r in self._requests.values()
        )
