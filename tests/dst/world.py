"""One seed, from its first request to the last place that is given back.

The API process' dispatcher and streams, and engine processes behind their links, on one clock:
what happens next is what is due next. A process that ends is replaced after some time, as the
supervisor does. Rules: nothing is random but what the seed gives. Must not know: what a request is
owed (clients.py), what an engine owes (engine_process.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from heapq import heappop, heappush
from math import inf

from fastserve.client.dispatch import Dispatcher
from fastserve.client.streams import RequestStream
from fastserve.core.lengths import LengthModel
from fastserve.core.messages import SchedulerStats
from fastserve.sim.clock import VirtualClock
from fastserve.wire.engine_messages import (
    Event,
    Ready,
    Rejected,
    RequestNumber,
    Updates,
    checked,
)
from tests.dst.clients import BrokenPromiseError, Client, End
from tests.dst.engine_process import EngineProcess
from tests.dst.outcome import STATS, Outcome, Tallies
from tests.dst.scenario import Asked, Fault, FaultKind, Scenario, draw_scenario
from tests.dst.story import ALL, Story

START_S = (0.01, 0.3)  # until a process has loaded
SILENCE_S = (0.05, 0.6)  # until one that hangs is killed
MAX_MOMENTS = 200_000


class Failure(Exception):
    """A seed that breaks a promise: which one, and the story of the request."""

    def __init__(self, seed: int, what: str, story: str) -> None:
        super().__init__(f"seed {seed}: {what}\n{story}")
        self.seed = seed


class World:
    """A run under way; the faults that happened are counted as they do."""

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        self.clock = VirtualClock()
        self.story = Story(self.clock)
        self.outcome = Outcome()
        self._scenario = scenario
        self._rng = rng
        self._tallies = [Tallies() for _ in range(scenario.num_replicas)]
        self._dispatcher = Dispatcher(*self._tallies, now=self.clock.now)  # type: ignore[arg-type]
        self._processes: list[EngineProcess | None] = [None] * scenario.num_replicas
        self._models = [LengthModel() for _ in range(scenario.num_replicas)]
        self._num_given_up = 0
        self._clients: list[Client] = []
        self._open: dict[RequestNumber, Client] = {}
        self._places: dict[int, int] = {}
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._num_planned = 0

    def go(self) -> Outcome:
        """Let everything happen; a BrokenPromiseError or an AssertionError says what should not."""
        for replica in range(self._scenario.num_replicas):
            self._after(self._rng.uniform(*START_S), partial(self._start, replica))
        for choices in self._scenario.asked:
            self._plan(choices[0].at, partial(self._submit, choices))
        for fault in self._scenario.faults:
            self._plan(fault.at, partial(self._strike, fault))
        num_moments = 0
        while (at := self._next_at()) < inf:
            self.clock.time = max(self.clock.time, at)
            self._pass_moment()
            num_moments += 1
            assert num_moments < MAX_MOMENTS, "it goes on for ever"
        self._check_end()
        return self.outcome

    # ── time ─────────────────────────────────────────────────────────────────────────────────

    def _plan(self, at: float, action: Callable[[], None]) -> None:
        heappush(self._agenda, (at, self._num_planned, action))
        self._num_planned += 1

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._plan(self.clock.time + seconds, action)

    def _next_at(self) -> float:
        at = self._agenda[0][0] if self._agenda else inf
        for process in self._processes:
            if process is not None:
                at = min(at, process.next_at, process.words.next_at)
        return at

    def _pass_moment(self) -> None:
        while self._agenda and self._agenda[0][0] <= self.clock.time:
            heappop(self._agenda)[2]()
        for replica, process in enumerate(self._processes):
            if process is None:
                continue
            for event in process.heard():
                self._hear(event, process, replica)
            if process.next_at <= self.clock.time:
                process.turn()
            if process.is_over and process.words.next_at == inf:
                self._bury(process, replica)

    # ── clients ──────────────────────────────────────────────────────────────────────────────

    def _submit(self, choices: Sequence[Asked]) -> None:
        self.outcome.num_requests += len(choices)
        if self._num_given_up == len(self._processes):
            self.outcome.ends[End.NO_ENGINE] += len(choices)
            return
        arrivals = [checked(asked.arrival) for asked in choices]
        streams = self._dispatcher.submit_choices(arrivals)
        for asked, stream in zip(choices, streams, strict=True):
            self._open_client(asked, stream)

    def _open_client(self, asked: Asked, stream: RequestStream) -> None:
        client = Client(asked, stream, self.story)
        self._clients.append(client)
        self._open[client.number] = client
        num_prompt = len(asked.arrival.prompt_token_ids)
        self.story.tell(f"comes: {num_prompt} ids, {client.num_owed} are owed", client.number)
        self._note_place(client)
        if asked.leaves_after_s < inf:
            self._after(asked.leaves_after_s, partial(self._leave, client))

    def _leave(self, client: Client) -> None:
        client.leave()
        self._read(())

    def _read(self, numbers: Iterable[RequestNumber]) -> None:
        """Let some clients read; all of them where any end may have come."""
        for number in numbers:
            if number in self._open:
                self._let_read(self._open[number])
        while len(self._dispatcher.streams) != len(self._open):
            num_open = len(self._open)
            for client in list(self._open.values()):
                self._let_read(client)
            assert len(self._open) < num_open, "a stream is open that has ended"

    def _let_read(self, client: Client) -> None:
        client.read()
        if client.end is not None:
            del self._open[client.number]
            self._places.pop(client.number, None)
            self.outcome.ends[client.end] += 1

    def _note_place(self, client: Client) -> None:
        """Tell where a request has gone, if it has."""
        number = client.number
        for replica, process in enumerate(self._processes):
            if process is None or not process.link.has(client.number):
                continue
            if self._places.get(number) != id(process.link):
                self.outcome.num_moves += number in self._places
                self._places[number] = id(process.link)
                self.story.tell(f"is given to replica {replica}", number)

    # ── engines ──────────────────────────────────────────────────────────────────────────────

    def _start(self, replica: int) -> None:
        model = self._models[replica]
        process = EngineProcess(self._scenario, replica, self.clock, self._rng, model)
        self._processes[replica] = process
        self.story.tell(f"replica {replica} has loaded")

    def _hear(self, event: Event, process: EngineProcess, replica: int) -> None:
        process.link._note(event)
        if isinstance(event, Ready):
            self._dispatcher.begin(process.link, event.info)
            self._look_again()
            return
        self._note_failed_steps(process)
        self._dispatcher.receive(event, replica)
        if isinstance(event, Updates):
            self._read(number for number, _ in event.updates)
        elif isinstance(event, Rejected):
            self._read((event.number,))

    def _look_again(self) -> None:
        """Let all read, and see where they are."""
        self._read(list(self._open))
        for client in self._open.values():
            self._note_place(client)

    def _note_failed_steps(self, process: EngineProcess) -> None:
        for number in process.failed_numbers:
            if number in self._open:
                self._open[number].was_in_failed_step = True

    def _bury(self, process: EngineProcess, replica: int) -> None:
        """Do what the supervisor does when a process has ended."""
        link = process.link
        link.is_serving = False
        self._processes[replica] = None
        self._models[replica] = LengthModel.restored(process.length_model.state())
        for client in self._open.values():
            client.num_deaths += link.has(client.number)
        self._close_accounts(process)
        self.story.tell(f"replica {replica} is dead")
        self._dispatcher.lost(link, "it died")
        if self._rng.random() < self._scenario.share_given_up:
            self._count(FaultKind.GIVEN_UP, f"replica {replica} is given up")
            self._num_given_up += 1
            self._dispatcher.give_up(replica, "it is given up")
        else:
            self._after(self._rng.uniform(*START_S), partial(self._start, replica))
        self._look_again()

    def _close_accounts(self, process: EngineProcess) -> None:
        stats, faults = process.scheduler.stats(), self.outcome.faults
        self._count_stats(stats)
        faults.update(process.device.seen)
        faults[FaultKind.HOST_FULL] += process.num_times_full

    def _count_stats(self, stats: SchedulerStats) -> None:
        for name in STATS:
            self.outcome.stats[name] += getattr(stats, name)

    # ── what goes wrong ──────────────────────────────────────────────────────────────────────

    def _count(self, kind: FaultKind, text: str) -> None:
        self.outcome.faults[kind] += 1
        self.story.tell(text)

    def _strike(self, fault: Fault) -> None:
        """Let a planned fault happen, where there is what it happens to."""
        kind, replica = fault.kind, fault.replica
        process = self._processes[replica]
        if kind is FaultKind.CLOCK_JUMPED:
            self._count(kind, f"the clock jumps by {fault.lasts_s} s")
            self.clock.time += fault.lasts_s
            return
        if process is None or process.is_over or process.stopped_until > self.clock.time:
            return
        if kind is FaultKind.STEP_FAILED:  # counted when it does, as the next one
            process.device.fail_next_step()
            return
        if kind is FaultKind.NO_NUMBERS:
            process.device.spoil_next_sample()
            return
        self._count(kind, f"replica {replica}: {kind}")
        until = self.clock.time + fault.lasts_s
        if kind is FaultKind.ENGINE_KILLED:
            self._kill(process)
        elif kind is FaultKind.ENGINE_HUNG:
            process.stopped_until = inf
            self._after(self._rng.uniform(*SILENCE_S), partial(self._kill, process))
        elif kind is FaultKind.RANK_LOST:
            process.lose_rank()
        elif kind is FaultKind.ENGINE_STALLED:
            process.stopped_until = until
        else:
            process.clock.hold(until)

    def _kill(self, process: EngineProcess) -> None:
        num_lost = process.kill()
        if num_lost:
            self._count(FaultKind.WORDS_LOST, f"{num_lost} of its words are lost")

    # ── the end ──────────────────────────────────────────────────────────────────────────────

    def _check_end(self) -> None:
        """Assert that every request has ended, and nothing of any is left anywhere."""
        for number in self._open:
            raise BrokenPromiseError(number, "it never ends: nothing happens any more")
        for process in self._processes:
            if process is not None:
                process.check_at_rest()
                self._close_accounts(process)
        dispatcher, outcome = self._dispatcher, self.outcome
        assert not dispatcher._router._placed
        assert not dispatcher._suspects._deaths
        outcome.num_tokens = sum(len(client.received) for client in self._clients)
        assert sum(tally.num_tokens for tally in self._tallies) == outcome.num_tokens
        assert sum(tally.num_ended for tally in self._tallies) == len(self._clients)
        assert sum(outcome.ends.values()) == outcome.num_requests
        outcome.virtual_s = self.clock.time
        outcome.sha256 = self.story.sha256


def run_seed(seed: int) -> Outcome:
    """Return what became of a seed; Failure where it breaks a promise."""
    return asyncio.run(_run(seed, World(draw_scenario(seed), random.Random(-1 - seed))))


async def _run(seed: int, world: World) -> Outcome:
    """Run within an event loop, which streams need to be asked whether they have news."""
    try:
        return world.go()
    except Exception as error:
        number = error.number if isinstance(error, BrokenPromiseError) else ALL
        story = world.story.end() if number == ALL else world.story.of(number)
        what = f"{type(error).__name__}: {error}"
        raise Failure(seed, what, story) from error
