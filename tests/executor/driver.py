"""Drives a worker or an executor with hand-written plans: no scheduler is needed to test them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastserve.core.messages import (
    NewRequest,
    Sample,
    SchedulerOutput,
    StepDone,
    TokenLogprobs,
    Work,
)
from fastserve.core.request import Handle, SamplingParams

Step = Callable[[SchedulerOutput], StepDone]

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Driven:
    """A request that the driver takes through its prompt in chunks, then token by token."""

    prompt: Sequence[int]
    params: SamplingParams = GREEDY
    num_tokens: int = 16
    chunk: int = 10_000
    samples: list[Sample] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def ids(self) -> list[int]:
        """All known ids."""
        return [*self.prompt, *(sample.token_id for sample in self.samples)]

    @property
    def output(self) -> list[int]:
        """The generated ids."""
        return [sample.token_id for sample in self.samples]

    @property
    def is_done(self) -> bool:
        """Whether everything asked for was generated."""
        return len(self.samples) >= self.num_tokens


class Driver:
    """Writes plans for requests that share a pool whose free blocks are in random order."""

    def __init__(self, step: Step, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.step = step
        self.block_size = block_size
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.step_id = 0
        self.next_handle = 0
        self.requests: dict[int, Driven] = {}
        self.forget: list[Handle] = []

    def add(self, request: Driven) -> int:
        """Let a request take part from the next step on."""
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.requests[handle] = request
        return handle

    def run(self, *requests: Driven) -> None:
        """Take requests to their end, all in one batch."""
        for request in requests:
            self.add(request)
        while self.requests:
            self.advance()

    def advance(self) -> StepDone:
        """Run one step of everyone, and end those who are done."""
        plan = self.plan(self.requests)
        done = self.step(plan)
        assert done.step_id == plan.step_id
        samples = iter(done.samples)
        for work in plan.work:
            request = self.requests[work.handle]
            request.num_computed += work.num_tokens
            request.prompt_logprobs += done.prompt_logprobs.get(work.handle, ())
            if work.sample:
                request.samples.append(next(samples))
        assert next(samples, None) is None
        for handle in [key for key, request in self.requests.items() if request.is_done]:
            self.free += self.requests.pop(handle).blocks
            self.forget.append(Handle(handle))
        return done

    def plan(self, requests: dict[int, Driven]) -> SchedulerOutput:
        """Write the plan of the next step."""
        new, works = [], []
        for handle, request in requests.items():
            start = request.num_computed
            if start == 0:
                prompt_len = len(request.prompt)
                new.append(NewRequest(Handle(handle), 0, prompt_len, request.params, ()))
            num_tokens = min(len(request.ids) - start, request.chunk)
            stop = start + num_tokens
            table_from = len(request.blocks)
            while len(request.blocks) * self.block_size < stop:
                request.blocks.append(self.free.pop())
            is_scored = request.params.prompt_logprobs is not None and start < len(request.prompt)
            works.append(
                Work(
                    handle=Handle(handle),
                    epoch=0,
                    start=start,
                    num_tokens=num_tokens,
                    token_ids=tuple(request.ids[start:stop]),
                    table_from=table_from,
                    block_ids=tuple(request.blocks[table_from:]),
                    sample=stop == len(request.ids),
                    logits="all" if is_scored else "last",
                )
            )
        self.step_id += 1
        forget, self.forget = tuple(self.forget), []
        return SchedulerOutput(self.step_id, tuple(new), tuple(works), forget=forget)
