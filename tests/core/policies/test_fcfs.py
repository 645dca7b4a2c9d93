"""FCFS: one queue in order of arrival."""

from __future__ import annotations

from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.protocol import StepBill
from fastserve.core.request import Arrival, Request, SamplingParams


def make_request(handle: int) -> Request:
    """Return a request that has done nothing yet."""
    return Request(handle, Arrival([1, 2, 3], SamplingParams()), max_output_tokens=4)


def order(policy: FCFS) -> list[int]:
    """Return the handles in order."""
    return [request.handle for request in policy.ordered(0.0)]


def test_order_is_arrival_whatever_happens() -> None:
    """Running, ending and coming back from elsewhere do not change who came first."""
    policy = FCFS()
    requests = [make_request(handle) for handle in range(5)]
    for request in requests:
        policy.admit(request, 0.0)
    policy.charge(StepBill(9.0, [(requests[0], 3)]), 9.0)
    assert order(policy) == [0, 1, 2, 3, 4]
    policy.remove(requests[0])
    policy.remove(requests[3])
    policy.remove(requests[1])
    assert order(policy) == [2, 4]
    policy.admit(requests[3], 10.0)
    policy.admit(requests[1], 10.0)
    assert order(policy) == [1, 2, 3, 4]


def test_the_youngest_is_the_coldest() -> None:
    """The estimates grow along the order, so KV is taken from its end."""
    policy = FCFS()
    requests = [make_request(handle) for handle in range(6)]
    for request in (requests[0], requests[3], requests[5], requests[1]):
        policy.admit(request, 0.0)
    estimates = [policy.estimated_next_schedule_time(r, 0.0) for r in policy.ordered(0.0)]
    assert estimates == sorted(set(estimates))
    assert policy.stats().requests_by_level == {0: 4}
