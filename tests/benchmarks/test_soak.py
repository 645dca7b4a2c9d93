"""What a soak draws, judges and reports."""

from __future__ import annotations

import asyncio
import json
import random
from statistics import fmean

import pytest

from benchmarks.footprint import Footprint
from benchmarks.soak import FIRST_RATE, LOOKS_A_SAMPLE, followed
from benchmarks.soak_figures import MIB, ROWS_OF_A_REPORT, Sample, course, memory, slope
from benchmarks.soak_requests import (
    CANARIES,
    FAULTS,
    NONSENSE,
    Clients,
    numbers_of,
    texts_of,
)
from fastserve.bench.stream_client import Endpoint, LostRequestError
from tests.server.scripted import ScriptedEngine, post, says


def event(number: int, *texts: str, **fields: object) -> bytes:
    """Return an event of a stream that can be resumed."""
    choices = [{"index": i, "text": text} for i, text in enumerate(texts)]
    return b"id: NAME:%d\ndata: %b\n\n" % (
        number,
        json.dumps({"choices": choices, **fields}).encode(),
    )


DONE = b"id: NAME:3\ndata: [DONE]\n\n"


def test_a_slope_is_that_of_the_best_line():
    """Of points on a line it is the line's; of one point there is none."""
    assert slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert slope([(0, 0), (1, 2), (2, 0)]) == pytest.approx(0)
    assert slope([(5, 5)]) == slope([]) == 0


def test_the_load_is_held_while_the_machine_changes_its_speed():
    """Seats are full where more clients come than are served; the mean is right all the same."""
    rng, rate = random.Random(1), FIRST_RATE
    shares = []
    for look in range(360 * LOOKS_A_SAMPLE):
        served = (6.0, 12.0)[look // 400 % 2] * rng.uniform(0.5, 1.5)
        shares.append(min(1.0, rate / served))
        rate = followed(rate, 0.9 - shares[-1])
    assert min(shares) < 0.5
    assert max(shares) == 1.0
    assert fmean(shares) == pytest.approx(0.9, abs=0.005)


def sampled(minute: int, api_mib: float, engine_mib: float) -> Sample:
    """Return a sample."""
    api, engine = (Footprint(20, 2, int(size * MIB)) for size in (api_mib, engine_mib))
    return Sample(60.0 * minute, 0.9, 5.0, 7, api, engine)


def test_memory_counts_once_it_is_warm():
    """What grew before does not; the rest is told by the hour."""
    samples = [sampled(minute, 70 + max(0, 10 - minute) * 5, 300 + minute) for minute in range(31)]
    told = memory(samples, warm_up_s=600)
    assert told["api"]["rss_mib_at_start"] == 120
    assert told["api"]["rss_mib_warm"] == told["api"]["rss_mib_at_end"] == 70
    assert told["api"]["slope_mib_per_hour"] == pytest.approx(0)
    assert told["engine"]["slope_mib_per_hour"] == pytest.approx(60)
    assert told["engine"]["rss_mib_max"] == 330
    assert len(course(samples)) <= 2 * ROWS_OF_A_REPORT


def test_a_stream_is_read_whole_or_not_at_all():
    """Texts by choice; one that ends otherwise than well is lost."""
    events = event(1, "a data: x", "b") + event(2, "", "c")
    assert texts_of(events + DONE) == ["a data: x", "bc"]
    assert numbers_of(events + DONE) == [1, 2, 3]
    for broken in (b"", events, event(1, error={"message": "no"}) + DONE):
        with pytest.raises(LostRequestError):
            texts_of(broken)


def test_a_gap_is_a_fault():
    """So is a repeat."""
    clients = Clients(Endpoint("localhost", 1), random.Random(1))
    assert clients.judged([1, 2, 3], "answered") == "answered"
    assert clients.judged([1, 3], "answered") == clients.judged([1, 1, 2], "answered") == "gap"
    assert "gap" in FAULTS
    assert clients.faults == ["events [1, 3]", "events [1, 1, 2]"]


def test_an_answer_that_never_comes_is_lost():
    """Nobody listens there: counted, noted, and no error."""
    clients = Clients(Endpoint("127.0.0.1", 1), random.Random(1))

    async def several() -> None:
        for _ in range(20):
            await clients.one()

    asyncio.run(several())
    assert clients.outcomes == {"lost": 20}
    assert clients.num_in_flight == 0
    assert clients.faults


@pytest.mark.parametrize("body", NONSENSE)
def test_nonsense_is_refused_and_canaries_are_not(body):
    """Or the counts of a soak would mean nothing."""
    assert 400 <= post(ScriptedEngine(), "/v1/completions", body).status_code < 500
    for canary in CANARIES:
        assert post(ScriptedEngine(says("a")), "/v1/completions", canary).status_code == 200
