"""One engine process in virtual time: the real loop, engine and scheduler over checked ranks.

Rules: it is held to account at every step. One that hangs or is stopped does nothing; what it has
said before still arrives. Of one that is killed only as much arrives as was written.
Must not know: dispatchers, clients, when it is replaced.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from math import inf

from fastserve.client.engine_link import EngineLink
from fastserve.core.build import build_scheduler
from fastserve.core.lengths import LengthModel
from fastserve.core.messages import ExecutorOutput, Fact, RequestUpdate, SchedulerOutput
from fastserve.core.request import Arrival, Handle
from fastserve.engine.engine import Engine
from fastserve.engine.process import Loop
from fastserve.sim.clock import VirtualClock
from fastserve.wire.engine_messages import (
    EngineInfo,
    Event,
    Failed,
    Ready,
    RequestNumber,
    decode_event,
)
from tests.core.harness import check_at_rest, spoil_free_places
from tests.dst.device import Device, token
from tests.dst.scenario import EOS, WINDOW, Scenario
from tests.dst.wire import Inbox, Outbox, Wire
from tests.fake_executor import undisturbed


class HeldClock:
    """The clock of a process: that of the world, but for times when it stands still."""

    def __init__(self, clock: VirtualClock) -> None:
        self.held_until = -inf
        self._held_at = 0.0
        self._clock = clock

    @property
    def is_held(self) -> bool:
        """Whether it stands still."""
        return self._clock.time < self.held_until

    def now(self) -> float:
        """Return the current time."""
        return self._held_at if self.is_held else self._clock.time

    def hold(self, until: float) -> None:
        """Stand still for some time, then be right again."""
        self._held_at = self.now()
        self.held_until = until


class Witness:
    """Observes an engine: a request has one end, and no news after it."""

    def __init__(self, foresee: dict[int, int] | None) -> None:
        """Into `foresee` go the lengths of all answers, for the policy that is to know them."""
        self.has_news = False
        self._foresee = foresee
        self._num_told = 0
        self._ended: set[Handle] = set()

    def told(self, fact: Fact, now: float) -> None:
        """See a request before the policy does: handles are counted up."""
        if isinstance(fact, Arrival) and self._foresee is not None:
            self._foresee[self._num_told] = len(undisturbed(fact.params, token, {EOS})[0])
            self._num_told += 1

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """See a plan, which the device checks."""

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Hold the news of a step to account."""
        self.has_news = True
        for update in updates:
            assert update.handle not in self._ended, "news after the terminal event"
            if update.finish_reason is not None:
                self._ended.add(update.handle)


class EngineProcess:
    """A process of a replica that has just loaded; `link` is how the other end knows it."""

    def __init__(
        self,
        scenario: Scenario,
        replica: int,
        clock: VirtualClock,
        rng: random.Random,
        length_model: LengthModel,
    ) -> None:
        config = scenario.config
        self.length_model = length_model
        self.failed_numbers: set[RequestNumber] = set()  # whose step failed
        self.num_times_full = 0  # that the host tier came to be
        self.is_over = False  # it does nothing more
        self.stopped_until = -inf
        self.clock = HeldClock(clock)
        self.words = Wire(clock, rng, scenario.longest_wire_s)
        self.device = Device(scenario, clock, rng, self._note_failed)
        self._world = clock
        self._commands = Wire(clock, rng, scenario.longest_wire_s)
        self.link = EngineLink(self._commands, replica)  # type: ignore[arg-type]
        lengths: dict[int, int] = {}
        self.scheduler = build_scheduler(
            config,
            scenario.costs,
            scenario.num_device_blocks,
            scenario.num_host_blocks,
            lengths=lengths,
            length_model=length_model,
        )
        self._witness = Witness(lengths if config.scheduling_policy == "srpt" else None)
        self.engine = Engine(self.scheduler, self.device, self.clock, [self._witness])
        inbox, self._outbox = Inbox(self._commands), Outbox(self.words)
        self._loop = Loop(self.engine, inbox, self._outbox)  # type: ignore[arg-type]
        self._check_every = scenario.check_every
        self._num_turns = 0
        self._is_full = False
        self._next_at = clock.time  # but for commands
        self._outbox.send(Ready(info_of(scenario)))

    @property
    def next_at(self) -> float:
        """When there is something to do for it; inf: not before it is told something."""
        if self.is_over:
            return inf
        return max(min(self._next_at, self._commands.next_at), self.stopped_until)

    def turn(self) -> None:
        """Do all that can be done at this moment."""
        try:
            while True:
                self._witness.has_news = False
                self._loop.turn(self._world.time)
                self._hold_to_account()
                if not self._witness.has_news and self.device.next_end > self._world.time:
                    break
        except RuntimeError as error:
            if not self.device.is_dead:
                raise
            self._outbox.send(Failed(str(error), running=self._loop.running()))
            self.is_over = True
            return
        self._next_at = self.device.next_end
        if self.clock.is_held:
            self._next_at = min(self._next_at, self.clock.held_until)
        else:
            event = self.scheduler.next_event(self._world.time)
            self._next_at = min(self._next_at, event, self._loop.next_due)

    def heard(self) -> list[Event]:
        """Take out what has arrived of what it said."""
        return [decode_event(payload) for payload in self.words.arrived()]

    # ── what is done to it ───────────────────────────────────────────────────────────────────

    def kill(self) -> int:
        """End at once; return how many of its words nobody will hear."""
        self.is_over = True
        return self.words.cut()

    def lose_rank(self) -> None:
        """Let a rank of its device leave: it finds out now, and says so."""
        self.device.lose_rank()
        self._next_at = self._world.time

    def _note_failed(self, handles: Collection[Handle]) -> None:
        numbers = self._loop._numbers
        self.failed_numbers.update(numbers[handle] for handle in handles if handle in numbers)

    # ── what it owes ─────────────────────────────────────────────────────────────────────────

    def _hold_to_account(self) -> None:
        pool = self.scheduler.cache.pool
        is_full = pool.host.num_blocks > 0 and not pool.num_host_available
        self.num_times_full += is_full and not self._is_full
        self._is_full = is_full
        self._num_turns += 1
        if self._num_turns % self._check_every == 0:
            self.scheduler.check()
            spoil_free_places(self.scheduler, self.device.fake)

    def check_at_rest(self) -> None:
        """Assert that it holds nothing of any request."""
        assert self.engine.is_idle, "it is not idle, and does nothing"
        check_at_rest(self.scheduler)
        assert not self.device.fake.states
        assert not self._loop._handles
        assert not self._loop._numbers
        assert not self.link._given


def info_of(scenario: Scenario) -> EngineInfo:
    """Return what an engine says of itself once it has loaded."""
    config = scenario.config
    return EngineInfo(
        model="dst",
        max_model_len=WINDOW,
        max_request_tokens=WINDOW,
        vocab_size=2**20,
        block_size=config.block_size,
        num_device_blocks=scenario.num_device_blocks,
        num_host_blocks=scenario.num_host_blocks,
        block_bytes=1,
        eos_token_ids=config.eos_token_ids,
        dtype="float32",
        device="cpu",
        cost_model=scenario.costs,
        max_num_seqs=config.max_num_seqs,
        enable_prefix_caching=config.enable_prefix_caching,
        tensor_parallel_size=scenario.layout.tensor_parallel_size,
        pipeline_parallel_size=scenario.layout.pipeline_parallel_size,
    )
