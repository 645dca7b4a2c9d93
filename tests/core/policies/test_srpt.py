"""SRPT: the order of true remaining work."""

from __future__ import annotations

from random import Random

import pytest

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.srpt import srpt
from fastserve.core.request import FinishReason, Request
from tests.core.builders import make_request, note_step

COST = CostModel(base_s=1.0, prefill_token_s=0.1)


def test_remaining_time_by_hand() -> None:
    """A prefill of 10 takes 2 s and yields the first of 5 tokens; four decodes of 1 s follow."""
    policy = srpt(COST, {0: 5})
    request = make_request(0, 10)
    policy.admit(request, 0.0)
    assert policy.coldness(request, 0.0) == pytest.approx((6.0,))
    request.num_computed_tokens = 10
    request.append(7)
    note_step(policy, [request], 2.0, 2.0)
    assert policy.coldness(request, 2.0) == pytest.approx((4.0,))
    request.num_computed_tokens = 11
    request.append(7)
    note_step(policy, [request], 1.0, 3.0)
    assert policy.coldness(request, 3.0) == pytest.approx((3.0,))


def test_order_is_sorted_at_all_times() -> None:
    """After any arrivals, steps and ends the order is that of remaining time, then arrival."""
    rng = Random(5)
    lengths = {handle: rng.choice((1, 1, 3, 20)) for handle in range(60)}
    policy = srpt(COST, lengths)
    live: dict[int, Request] = {}
    for handle in range(60):
        live[handle] = make_request(handle, rng.choice((1, 5, 5, 30)))
        policy.admit(live[handle], 0.0)
        for request in rng.sample(list(live.values()), min(len(live), 2)):
            request.num_computed_tokens = request.num_tokens
            if request.num_output_tokens + 1 == lengths[request.handle]:
                policy.finished(live.pop(request.handle), FinishReason.LENGTH)
                continue
            request.append(1)
            note_step(policy, [request], 1.0, 0.0)
        keys = [(policy.coldness(r, 0.0), r.handle) for r in policy.ordered()]
        assert keys == sorted(keys)
        assert {handle for _, handle in keys} == set(live)
