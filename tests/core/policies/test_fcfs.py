"""FCFS: one queue in order of arrival."""

from __future__ import annotations

from fastserve.core.policies.fcfs import FCFS
from fastserve.core.request import FinishReason
from tests.core.builders import admit, make_request, order, run


def test_order_is_arrival_whatever_happens() -> None:
    """Running, ending and coming back from elsewhere do not change the order of arrival."""
    policy = FCFS()
    requests = [make_request(handle) for handle in range(5)]
    admit(policy, requests)
    run(policy, [requests[0]], 9.0, 9.0)
    assert order(policy) == [0, 1, 2, 3, 4]
    policy.finished(requests[0], FinishReason.STOP)
    policy.finished(requests[3], FinishReason.STOP)
    policy.finished(requests[1], FinishReason.STOP)
    assert order(policy) == [2, 4]
    elsewhere = FCFS()
    for handle in (4, 2):
        policy.move(requests[handle], elsewhere)
    assert order(policy) == []
    for handle in (4, 2):
        elsewhere.move(requests[handle], policy)
    assert order(policy) == [2, 4]


def test_the_youngest_is_the_coldest() -> None:
    """Coldness grows along the order, so KV is taken from its end."""
    policy = FCFS()
    requests = [make_request(handle) for handle in range(6)]
    admit(policy, [requests[0], requests[1], requests[3], requests[5]])
    coldness = [policy.coldness(request, 0.0) for request in policy.ordered()]
    assert coldness == sorted(set(coldness))
