"""The messages between deciding and doing: facts come in, plans go out.

Rules: immutable tuples of plain values. They are NamedTuples, not frozen dataclasses: as immutable
and as slotted, a third of the cost to build, and a step builds one per running request.
Must not know: the API's numbers of requests, text, tensors, how a plan is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from fastserve.core.request import Arrival, FinishReason, Handle, SamplingParams


class NewRequest(NamedTuple):
    """What a worker must hold of a request before the first Work of an epoch."""

    handle: Handle
    epoch: int
    num_prompt_tokens: int
    params: SamplingParams
    cached_token_ids: Sequence[int]  # ids before the first Work's start: their KV is cached


class Work(NamedTuple):
    """One request's share of one step: positions [start, start + num_tokens)."""

    handle: Handle
    epoch: int  # results of an older epoch are dropped
    start: int
    num_tokens: int
    token_ids: Sequence[int]  # one shorter than num_tokens while the last sample is in flight
    table_from: int  # the worker sets table[table_from:] = block_ids
    block_ids: Sequence[int]
    sample: bool
    logits: Literal["last", "all"]  # all: every position is scored (prompt_logprobs)


class CopyDirection(StrEnum):
    """Which way KV moves."""

    SWAP_OUT = "out"
    SWAP_IN = "in"


class Copy(NamedTuple):
    """Blocks to copy from one tier to the other: src[i] → dst[i].

    It may begin at once: whatever wrote `src` has landed, and nothing else touches `dst` before the
    copy is reported. Steps may read `src` meanwhile.
    """

    copy_id: int
    direction: CopyDirection
    src: tuple[int, ...]
    dst: tuple[int, ...]


NO_STEP = -1  # the step_id of a plan without work: only steps are numbered


class SchedulerOutput(NamedTuple):
    """One plan: a step's work, copies to begin, handles to forget; each may be all there is.

    `forget` names handles whose worker state goes before the work is done. A plan without work
    takes no slot and yields no StepDone.
    """

    step_id: int
    new_requests: tuple[NewRequest, ...]
    work: tuple[Work, ...]
    copies: tuple[Copy, ...] = ()
    forget: tuple[Handle, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions computed in this step."""
        return sum(work.num_tokens for work in self.work)


class TokenLogprobs(NamedTuple):
    """Log probability and rank (1 = best) of the chosen id, and the best `k` alternatives."""

    logprob: float
    rank: int
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


NO_TOKEN = -1  # the token_id of a Sample for which none could be drawn, as the sampler says it
NOT_FINITE = "the model's logits are not finite numbers"  # the error of a request that got one


class Sample(NamedTuple):
    """The id drawn for one Work, or NO_TOKEN."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class StepDone(NamedTuple):
    """A finished step: one Sample for each Work with `sample`, in the plan's order.

    `prompt_logprobs[handle]` scores the ids at positions [max(start, 1), start + num_tokens) of a
    Work with logits="all" as far as they belong to the prompt. A step that failed has an `error`,
    one line that says why, and nothing else: what it was to compute is lost.
    """

    step_id: int
    samples: Sequence[Sample]
    device_s: float
    prompt_logprobs: Mapping[Handle, Sequence[TokenLogprobs]] = {}
    error: str | None = None


class ExecutorOutput(NamedTuple):
    """Everything that finished, steps in their order; a copy counts when every rank has done it.

    Of `failed_copies`, what is at their `dst` is worth nothing.
    """

    steps: Sequence[StepDone] = ()
    copies: Sequence[int] = ()
    failed_copies: Sequence[int] = ()


class Aborted(NamedTuple):
    """A request is given up."""

    handle: Handle


class Finished(NamedTuple):
    """A stop string in the text ended a request after so many output ids."""

    handle: Handle
    num_output_tokens: int


Fact = Arrival | Aborted | Finished | ExecutorOutput
"""Everything a scheduler is told."""


class RequestFailedError(RuntimeError):
    """The engine failed to run this one request; the message is one line."""


class NotFiniteError(RequestFailedError):
    """The model computed no numbers for this one request."""


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What happened to one request. Times are seconds of the engine's clock."""

    arrival: float
    first_scheduled: float | None
    first_token: float | None
    finished: float
    queue_s: float
    num_preemptions: int
    num_swaps: int  # times that KV of it came back from the host
    swap_s: float  # in which it could have run but for that
    recomputed_tokens: int
    cached_tokens: int
    level: int
    predicted_output_tokens: float | None  # expected when it came; None: not predicted


class RequestUpdate(NamedTuple):
    """News of one request from Scheduler.update; `finish_reason` makes it the terminal event."""

    handle: Handle  # NO_HANDLE where no engine made it
    samples: Sequence[Sample]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id that ended it, unless it is an EOS
    metrics: RequestMetrics | None = None  # with the terminal event
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    error: str | None = None  # with FinishReason.ERROR: why, in one line


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecasts:
    """How predicted lengths turned out, and what is ahead; counts and sums only grow.

    Each answer counts in the decile of its predicted distribution that its length fell into: where
    predictions are right all deciles are alike. Tokens are sums over the same answers. Work is in
    machine seconds.
    """

    num_by_decile: Sequence[int]
    predicted_tokens: float
    answered_tokens: int
    work_s: float  # expected in the system now
    mean_work_s: float  # that an arrival finds


WORK_BOUNDS_S = (0.01, 0.1, 1.0, 10.0)
"""Requests are counted by the machine seconds expected of them below each, and above them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """A snapshot for people: counters only grow, the rest is now.

    Where nothing is predicted `forecasts` is None and `requests_by_work` is empty.
    """

    num_running: int
    num_waiting: int
    num_preempted: int
    requests_by_level: Mapping[int, int]
    device_blocks_total: int
    device_blocks_free: int
    device_blocks_cached: int
    device_blocks_moving: int  # to or from the host: of no use to a step
    device_blocks_used: int
    host_blocks_total: int
    host_blocks_free: int
    host_blocks_cached: int
    host_blocks_moving: int
    host_blocks_used: int
    num_steps: int
    num_preemptions: int
    num_demotions: int
    num_promotions: int
    num_recomputed_tokens: int
    num_computed_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_dropped_samples: int
    num_stalls: int
    num_swaps: int  # requests whose KV came back from the host
    num_swapped_out_blocks: int  # copied to the host to make room
    num_swapped_in_blocks: int  # copied back for a request that was to run
    num_saved_blocks: int  # copied to the host ahead of need
    num_fetched_blocks: int  # copied back ahead of need
    num_clean_blocks: int  # taken from the device without a copy: it was on the host
    num_failed_copies: int
    copy_wait_s: float  # in which nothing could run but for a copy
    forecasts: Forecasts | None
    requests_by_work: Sequence[int]  # in the buckets of WORK_BOUNDS_S
