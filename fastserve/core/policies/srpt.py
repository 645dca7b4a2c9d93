"""Shortest remaining processing time: the clairvoyant bound that no blind policy beats.

It is handed the true output lengths, so only benchmarks and the simulator can use it.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.by_key import ByKey
from fastserve.core.request import Request


def srpt(cost_model: CostModel, lengths: Mapping[int, int]) -> ByKey:
    """Return a policy of requests sorted by the seconds they would need alone on the machine.

    `lengths` maps a handle to its true number of output tokens.
    """

    def seconds_left(request: Request) -> float:
        end = request.num_prompt_tokens + lengths[request.handle]
        seconds, start = 0.0, request.num_computed_tokens
        if request.num_tokens - start > 1:
            seconds += cost_model.iteration_s(request.num_tokens - start, start)
            start = request.num_tokens
        num_decodes = max(end - 1 - start, 0)
        middle = start + num_decodes // 2
        return seconds + num_decodes * cost_model.iteration_s(1, middle)

    return ByKey(seconds_left)
