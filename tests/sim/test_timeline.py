"""What is watched during a run: bounded samples, and a trace that a viewer can open."""

from __future__ import annotations

import io
import json

import pytest

from fastserve.core.messages import Copy, CopyDirection, ExecutorOutput
from fastserve.sim import timeline
from fastserve.sim.simulator import simulate
from fastserve.sim.timeline import Timeline, TraceEvents
from tests.sim.machines import MACHINE, make_workload, small_config

WORKLOAD = make_workload(*[(0.5 * index, 10, 12) for index in range(20)])


def test_samples_show_who_waits_and_who_runs():
    """All requests are in one of the three states; times grow; at the end nothing is held."""
    watched: list[Timeline] = []

    def observers(scheduler):
        watched.append(Timeline(scheduler))
        return watched

    simulate(small_config(), MACHINE, WORKLOAD, observers=observers)
    samples = watched[0].samples
    assert len(samples) > 10
    assert [sample.at for sample in samples] == sorted({sample.at for sample in samples})
    assert max(sample.num_running for sample in samples) == 4
    assert max(sample.num_waiting for sample in samples) > 4
    assert samples[-1].num_device_blocks == samples[-1].num_live == 0


def test_samples_are_halved_when_there_are_too_many(monkeypatch):
    """A run a thousand times as long has no more samples, still evenly spread."""
    monkeypatch.setattr(timeline, "MAX_SAMPLES", 16)
    watched: list[Timeline] = []

    def observers(scheduler):
        watched.append(Timeline(scheduler))
        return watched

    simulate(small_config(), MACHINE, WORKLOAD, observers=observers)
    first = watched[0]
    assert 8 <= len(first.samples) < 16
    number = len(first.samples)
    first.updated(ExecutorOutput(), (), first.samples[-1].at)  # too soon
    assert len(first.samples) == number


@pytest.mark.parametrize("num_slots", [1, 2])
def test_trace_events_are_json_with_every_step(num_slots):
    """One slice per step and stage; slices of a stage do not overlap."""
    file = io.StringIO()
    events = TraceEvents(file, "fcfs")

    def observers(scheduler):
        events.scheduler = scheduler
        return ()

    outcome = simulate(
        small_config(num_slots=num_slots),
        MACHINE,
        WORKLOAD,
        on_step=events.see,
        observers=observers,
    )
    events.close()
    written = json.loads(file.getvalue())
    assert written[0]["args"] == {"name": "fcfs"}
    slices = [event for event in written if event["ph"] == "X"]
    assert len(slices) == outcome.num_steps * num_slots
    for stage in range(num_slots):
        ends = 0.0
        for event in [item for item in slices if item["tid"] == stage]:
            assert event["ts"] >= ends - 0.002
            ends = event["ts"] + event["dur"]
    busy_s = sum(event["dur"] for event in slices) / 1e6 / num_slots
    assert busy_s == pytest.approx(outcome.busy_s, rel=1e-4)
    counters = {event["name"] for event in written if event["ph"] == "C"}
    assert counters == {"requests in the system", "requests with KV", "KV blocks"}


def test_trace_events_without_a_scheduler_have_no_counters():
    """Steps alone can be traced too."""
    file = io.StringIO()
    events = TraceEvents(file, "fcfs")
    simulate(small_config(), MACHINE, WORKLOAD, on_step=events.see)
    events.close()
    assert {event["ph"] for event in json.loads(file.getvalue())} == {"M", "X"}


def test_copies_have_a_row_for_each_direction():
    """Beside the steps, so that a viewer shows what the link does meanwhile."""
    file = io.StringIO()
    events = TraceEvents(file, "fcfs")
    events.see_copy(Copy(4, CopyDirection.SWAP_OUT, (1, 2), (3, 4)), 1.0, 1.5)
    events.see_copy(Copy(5, CopyDirection.SWAP_IN, (3,), (1,)), 1.2, 1.3)
    events.close()
    _, out, back = json.loads(file.getvalue())
    assert (out["name"], out["ts"], out["dur"]) == ("swap out 2", 1e6, 5e5)
    assert (back["name"], back["ts"], back["dur"]) == ("swap in 1", 1.2e6, 1e5)
    assert out["tid"] != back["tid"]
