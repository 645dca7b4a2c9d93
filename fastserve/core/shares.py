"""Shares: what one request's share of a step says to the worker, and what its result says of it.

Must not know: the other requests of the step, policies, whether blocks are free.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from fastserve.core.memory.table import BlockTable
from fastserve.core.messages import NewRequest, StepDone, TokenLogprobs, Work
from fastserve.core.request import FinishReason, Request


def introduction(request: Request) -> NewRequest:
    """Return what the worker must hold of a request before the first Work of an epoch."""
    return NewRequest(
        request.handle,
        request.epoch,
        request.num_prompt_tokens,
        request.params,
        request.token_ids(0, request.num_scheduled_tokens),
    )


def work_of(request: Request, table: BlockTable, num_tokens: int) -> Work:
    """Return the Work of a request's next tokens; what it names of the table counts as sent."""
    start = request.num_scheduled_tokens
    stop = start + num_tokens
    table_from = table.num_sent
    block_ids: tuple[int, ...] = ()
    if table_from < len(table.blocks):
        block_ids = tuple([block.device_id for block in table.blocks[table_from:]])
        table.num_sent = len(table.blocks)
    is_scored = request.params.prompt_logprobs is not None and start < request.num_prompt_tokens
    return Work(
        request.handle,
        request.epoch,
        start,
        num_tokens,
        request.token_ids(start, stop),
        table_from,
        block_ids,
        stop == request.num_tokens + request.num_pending_samples,
        "all" if is_scored else "last",
    )


def new_scores(request: Request, start: int, done: StepDone) -> Sequence[TokenLogprobs]:
    """Return the prompt's scores of a share from `start` that were not delivered before.

    Those that come again after a recomputation are left out; the rest count as delivered.
    """
    scores = done.prompt_logprobs.get(request.handle, ())
    # Position 0 has no score: the first one of a share is for position max(start, 1).
    scored = scores[max(request.num_scored_tokens + 1 - max(start, 1), 0) :]
    request.num_scored_tokens += len(scored)
    return scored


def end_at(request: Request, token_id: int, eos_token_ids: Container[int]) -> FinishReason | None:
    """Return why a request ends with an id that was appended, if it does.

    A stop id that is no EOS becomes its `stop_reason`.
    """
    is_stop = token_id in request.stop_token_ids
    if is_stop and request.num_output_tokens >= request.params.min_tokens:
        if token_id not in eos_token_ids:
            request.stop_reason = token_id
        return FinishReason.STOP
    return FinishReason.LENGTH if request.num_tokens >= request.max_num_tokens else None
