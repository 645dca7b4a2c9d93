"""The heartbeat: it beats whatever hangs, and tells of a hang once it is one."""

from __future__ import annotations

import itertools
import queue
import re
import threading

import pytest

from fastserve.engine.heartbeat import LOOKS, Heartbeat, where_threads_are
from fastserve.engine.step_watch import Hang

HANG = Hang("it hangs")


class Looks:
    """What `overdue` says at one look after the other; the last one stays."""

    def __init__(self, *answers: Hang | None) -> None:
        self.num_beats = 0
        self.num_looks = 0
        self.told: queue.SimpleQueue[tuple[Hang, int]] = queue.SimpleQueue()
        self.has_seen_all = threading.Event()
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))
        self._count = len(answers)

    def beat(self) -> None:
        self.num_beats += 1

    def overdue(self) -> Hang | None:
        self.num_looks += 1
        if self.num_looks > self._count + LOOKS:
            self.has_seen_all.set()
        return next(self._answers)

    def on_hang(self, hang: Hang) -> None:
        self.told.put((hang, self.num_looks))

    def watched(self) -> Heartbeat:
        """Return a heartbeat that looks here."""
        heartbeat = Heartbeat(self.beat, 0.001)
        heartbeat.overdue, heartbeat.on_hang = self.overdue, self.on_hang
        return heartbeat


def test_a_hang_is_told_once_it_was_seen_often_enough() -> None:
    """Once, though it goes on; looks in between that find nothing begin the count anew."""
    looks = Looks(None, HANG, HANG, None, HANG)
    heartbeat = looks.watched()
    assert looks.told.get(timeout=30) == (HANG, 4 + LOOKS)
    assert looks.has_seen_all.wait(30)
    heartbeat.stop()
    assert looks.told.empty()


@pytest.mark.parametrize("answers", [(None,), (HANG, HANG, None)])
def test_what_gets_on_is_left_alone(answers: tuple[Hang | None, ...]) -> None:
    """One that was late too, as a process is that was stopped itself."""
    looks = Looks(*answers)
    heartbeat = looks.watched()
    assert looks.has_seen_all.wait(30)
    heartbeat.stop()
    assert looks.told.empty()
    assert looks.num_beats >= looks.num_looks > 0


def test_each_thread_is_named_with_where_it_is() -> None:
    """But for the one that asks."""
    is_there, may_go = threading.Event(), threading.Event()

    def linger() -> None:
        is_there.set()
        may_go.wait()

    thread = threading.Thread(target=linger, name="somebody")
    thread.start()
    is_there.wait()
    lines = where_threads_are()
    may_go.set()
    thread.join()
    (line,) = [line for line in lines if line.startswith("somebody: ")]
    assert re.search(r" < linger \(test_heartbeat.py:\d+\) < ", line)
    assert not any("where_threads_are" in line for line in lines)
