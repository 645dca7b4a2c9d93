"""What tests of the core are built from: prompts, requests, work, steps of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastserve.core.messages import SchedulerOutput, Work
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Arrival, Handle, Request, SamplingParams


def one_second(plan: SchedulerOutput) -> float:
    """Every step takes a second."""
    return 1.0


def prompt_of(handle: int, length: int) -> list[int]:
    """Return ids that no other handle has."""
    return [1000 * (handle + 1) + position for position in range(length)]


def make_work(**changes: Any) -> Work:
    """Return one token of request 0, the next of whose ids is sampled, unless told otherwise."""
    fields: dict[str, Any] = {
        "handle": Handle(0),
        "epoch": 0,
        "start": 0,
        "num_tokens": 1,
        "token_ids": (),
        "table_from": 0,
        "block_ids": (),
        "sample": True,
        "logits": "last",
    }
    return Work(**(fields | changes))


def make_request(handle: int, num_prompt: int = 1, **kw: Any) -> Request:
    """Return a request that has done nothing yet; `kw` are fields of its Arrival."""
    arrival = Arrival(range(num_prompt), SamplingParams(), **kw)
    return Request(Handle(handle), arrival, max_output_tokens=99)


def admit(policy: Policy, requests: Sequence[Request], now: float = 0.0) -> None:
    """Admit requests as the scheduler does."""
    for request in requests:
        request.last_ran_at = now
        policy.admit(request, now)


def note_step(policy: Policy, requests: Sequence[Request], device_s: float, now: float) -> None:
    """Tell a policy, as the scheduler does, of a step whose tokens are counted already."""
    for request in requests:
        if request.first_scheduled_at is None:
            request.first_scheduled_at = now - device_s
        request.attained_s += device_s
        request.last_ran_at = now
    policy.ran(requests, now)


def run(policy: Policy, requests: Sequence[Request], device_s: float, now: float) -> None:
    """Let one step land that computed all that each request has."""
    for request in requests:
        request.num_computed_tokens = request.num_tokens
        request.append(5)
    note_step(policy, requests, device_s, now)


def order(policy: Policy, now: float = 0.0) -> list[int]:
    """Return the handles in order at a time."""
    policy.advance(now)
    return [request.handle for request in policy.ordered()]
