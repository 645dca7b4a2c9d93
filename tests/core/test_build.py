"""build_scheduler: settings arrive where they act."""

from __future__ import annotations

import pytest

from fastserve.core.build import build_policy, build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.policies.by_key import ByKey
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.mlfq import MLFQ
from fastserve.core.policies.run_to_completion import RunToCompletion
from fastserve.core.request import Arrival, Handle, Request, SamplingParams
from tests.core.harness import small_config

COST = CostModel(base_s=1.0, prefill_token_s=1.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fcfs", FCFS),
        ("hrrn", RunToCompletion),
        ("mlfq", MLFQ),
        ("sjf", RunToCompletion),
        ("skip-join-mlfq", MLFQ),
        ("fixed-priority", ByKey),
        ("srpt", ByKey),
    ],
)
def test_each_name_builds_its_policy(name: str, kind: type) -> None:
    """A name is a policy, fresh every time."""
    config = small_config(scheduling_policy=name)
    first, second = (build_policy(config, COST, lengths={}) for _ in range(2))
    assert type(first) is kind
    assert first is not second


@pytest.mark.parametrize("name", ["srpt", "shortest-first"])
def test_what_cannot_be_built_is_named(name: str) -> None:
    """An unknown policy, or foresight without lengths, is an error that names it."""
    with pytest.raises(ValueError, match=name):
        build_policy(small_config(scheduling_policy=name), COST)


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, 4),  # 9 s in one chunk, 1 + 8: quanta 1 2 4 8 16
        ({"scheduling_policy": "mlfq"}, 0),
        ({"max_num_batched_tokens": 4}, 4),  # two chunks, 10 s
        ({"max_num_batched_tokens": 1}, 4),  # eight chunks, 16 s
        ({"max_num_batched_tokens": 1, "enable_chunked_prefill": False}, 4),
        ({"mlfq_quantum": 3.0}, 2),
        ({"mlfq_quantum": 9.0}, 0),
        ({"mlfq_quantum_ratio": 9.0}, 1),
    ],
)
def test_quanta_come_from_settings_and_costs(changes: dict[str, object], level: int) -> None:
    """q₁ is the setting or the least iteration, the ratio and the chunks are the settings'."""
    config = small_config(**({"scheduling_policy": "skip-join-mlfq"} | changes))
    policy = build_policy(config, COST)
    request = Request(Handle(0), Arrival(range(8), SamplingParams()), max_output_tokens=4)
    policy.admit(request, 0.0)
    assert policy.levels is not None
    assert policy.levels.level(request) == level


def test_a_window_beyond_the_pool_is_refused() -> None:
    """A request that is let in could else wait for ever."""
    build_scheduler(small_config(max_model_len=16), COST, 4)
    with pytest.raises(ValueError, match="4 blocks of 4 tokens do not hold the window of 17"):
        build_scheduler(small_config(max_model_len=17), COST, 4)


def test_expected_work_is_in_seconds_of_the_machine() -> None:
    """A pipeline of two stages has two steps in flight: each request takes half as much of it."""
    work_s = []
    for num_slots in (1, 2):
        config = small_config(scheduling_policy="learned", num_slots=num_slots)
        scheduler = build_scheduler(config, COST, 10_000)
        scheduler.add(Arrival((5,) * 8, SamplingParams(max_tokens=4)), 0.0)
        forecasts = scheduler.stats().forecasts
        assert forecasts is not None
        work_s.append(forecasts.work_s)
    assert work_s[0] == pytest.approx(2 * work_s[1])
