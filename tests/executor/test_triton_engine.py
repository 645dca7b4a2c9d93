"""The CUDA path's parts together: kernels, late ids, graphs; on the CPU in Triton's interpreter.

Where there is no device, to capture an action is to keep it, and a launch is the computation:
everything else is what a device gets.
"""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch

import fastserve
from fastserve.core.messages import NewRequest, SchedulerOutput, StepDone, Work
from fastserve.core.request import Handle, SamplingParams
from fastserve.executor import local, opening, profiler, worker
from fastserve.executor.async_runner import make_async_runner
from fastserve.executor.cuda_graphs import ladder
from fastserve.executor.local import LocalExecutor
from fastserve.executor.worker import Worker
from fastserve.llm import LLM
from fastserve.model.ops.cuda_ops import CudaOps
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.settings.engine import EngineConfig
from tests.checkpoints import EOS_TOKEN_ID, VOCAB_SIZE, greedy, make_checkpoint
from tests.core.builders import make_work
from tests.executor.driver import GREEDY, Driven, Driver

RANDOM = SamplingParams(temperature=1.0, seed=5, top_p=0.9)
PENALIZED = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.3)
SCORED = SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1)
PROMPT = [random.Random(i).randrange(2, VOCAB_SIZE) for i in range(11)]


@pytest.fixture(scope="module", params=["opt", "qwen3"])
def checkpoint(request, tmp_path_factory):
    """A tiny model: its directory and the oracle."""
    path = tmp_path_factory.mktemp(request.param)
    return path, make_checkpoint(path, request.param)


@pytest.fixture
def replays(monkeypatch):
    """Workers get CUDA's parts; returns a list that grows with every replay of a graph."""
    torch.set_num_threads(1)
    replayed: list[int] = []

    def capture(action):
        def replay() -> None:
            replayed.append(1)
            action()

        return replay

    def make(*arguments, **settings):
        return make_async_runner(*arguments, **{**settings, "capture": capture})

    monkeypatch.setattr(worker, "choose_ops", lambda dtype, *_: CudaOps(dtype, TorchOps(dtype)))
    monkeypatch.setattr(worker, "make_async_runner", make)
    return replayed


def config(path) -> EngineConfig:
    """Return settings for few and small blocks."""
    return EngineConfig(
        model=str(path),
        device="cpu",
        block_size=8,
        num_device_blocks=64,
        max_num_seqs=6,
        max_model_len=64,
    )


def open_worker(path, *, is_async: bool) -> Worker:
    """Load a checkpoint into a worker whose free blocks are NaN."""
    return opening.open_worker(
        config(path),
        path,
        num_threads=1,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        on_progress=lambda stage, fraction: None,
        is_poisoned=True,
        is_async=is_async,
    ).worker


def run_requests(step) -> list[Driven]:
    """Take requests of every sort through prompts in chunks and a few tokens."""
    requests = [
        Driven(PROMPT[:length], params, num_tokens=tokens, chunk=chunk)
        for length, params, tokens, chunk in (
            (5, GREEDY, 6, 100),
            (11, GREEDY, 3, 5),
            (9, RANDOM, 3, 100),
            (3, PENALIZED, 3, 100),
            (6, SCORED, 2, 100),
        )
    ]
    Driver(step, 64, 8).run(*requests)
    return requests


def test_every_sort_of_request(checkpoint, replays, monkeypatch):
    """Greedy, random, penalized and scored requests in one batch get the plain worker's tokens."""
    path, model = checkpoint
    found = run_requests(open_worker(path, is_async=True).execute)
    assert replays  # some steps were decodes alone
    monkeypatch.setattr(worker, "choose_ops", lambda dtype, *_: TorchOps(dtype))
    expected = run_requests(open_worker(path, is_async=False).execute)
    assert [request.output for request in found] == [request.output for request in expected]
    assert found[0].output == greedy(model, found[0].ids, 6)
    assert found[1].output == greedy(model, found[1].ids, 3)
    scored = zip(found[4].samples, expected[4].samples, strict=True)
    for sample, plain in scored:
        assert sample.logprobs is not None
        assert plain.logprobs is not None
        assert math.isclose(sample.logprobs.logprob, plain.logprobs.logprob, abs_tol=1e-4)
    assert len(found[4].prompt_logprobs) == len(expected[4].prompt_logprobs) == 5


@pytest.mark.parametrize("params", [GREEDY, PENALIZED], ids=["greedy", "penalty"])
def test_a_step_begins_before_the_ids_of_the_last_are_known(params, replays, tmp_path):
    """Ids that never were on the host when they were needed give the tokens of one step at a time.

    The next plan is always launched before the last one is waited for.
    """
    make_checkpoint(tmp_path, "llama")
    request = Driven(PROMPT, params, num_tokens=6)
    Driver(open_worker(tmp_path, is_async=True).execute, 64, 8).run(request)

    ahead = open_worker(tmp_path, is_async=True)
    first = make_work(num_tokens=len(PROMPT), token_ids=tuple(PROMPT), block_ids=(3, 1))
    plans = [SchedulerOutput(0, (NewRequest(Handle(0), 0, len(PROMPT), params, ()),), (first,))]
    for position in range(len(PROMPT), len(PROMPT) + 5):
        blocks = (20 + position,) if position % 8 == 0 else ()
        later = make_work(start=position, table_from=position // 8, block_ids=blocks)
        plans.append(SchedulerOutput(position, (), (later,)))
    tokens, launched = [], []
    for plan in plans:
        launched.append(ahead.launch(plan))
        if len(launched) == 2:
            tokens += [sample.token_id for sample in launched.pop(0)().samples]
    tokens += [sample.token_id for sample in launched.pop()().samples]
    assert tokens == request.output
    assert ahead.table[Handle(0)].token_ids == request.ids


def test_rows_change_places_between_steps(replays, tmp_path):
    """An id that is late is found where it was drawn, whichever row needs it next."""
    model = make_checkpoint(tmp_path, "llama")
    ahead = open_worker(tmp_path, is_async=True)
    prompts = [PROMPT[:5], PROMPT[2:11], PROMPT[4:7]]

    def works(step: int, order: list[int]) -> tuple[Work, ...]:
        made = []
        for handle in order:
            length = len(prompts[handle])
            if step == 0:
                ids, blocks = tuple(prompts[handle]), (handle * 4, handle * 4 + 1)
                made.append(
                    make_work(handle=handle, num_tokens=length, token_ids=ids, block_ids=blocks)
                )
            else:
                made.append(make_work(handle=handle, start=length + step - 1))
        return tuple(made)

    new = tuple(NewRequest(Handle(i), 0, len(ids), GREEDY, ()) for i, ids in enumerate(prompts))
    finishes, orders = [], [[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]]
    for step, order in enumerate(orders):
        finishes.append(
            ahead.launch(SchedulerOutput(step, new if not step else (), works(step, order)))
        )
        if step:
            finishes[step - 1]()
    finishes[-1]()
    for handle, prompt in enumerate(prompts):
        ids = ahead.table[Handle(handle)].token_ids
        assert len(ids) == len(prompt) + 4
        assert greedy(model, ids, 4) == ids[-4:]


def test_a_failed_step_is_reported_in_order_and_its_requests_are_left_out(replays, tmp_path):
    """With two threads too: the step before it is whole, the one behind it runs without them."""
    make_checkpoint(tmp_path, "llama")
    executor = LocalExecutor(
        config(tmp_path),
        tmp_path,
        num_threads=1,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        on_progress=lambda stage, fraction: None,
        is_async=True,
    )
    assert executor.lookahead == 1
    size = len(PROMPT)

    def prefill(handle: int, blocks: tuple[int, ...]) -> tuple[NewRequest, Work]:
        new = NewRequest(Handle(handle), 0, size, GREEDY, ())
        return new, make_work(
            handle=handle, num_tokens=size, token_ids=tuple(PROMPT), block_ids=blocks
        )

    def decode(position: int) -> Work:
        return make_work(start=position, table_from=1)

    (new, first), (other, later) = prefill(0, (3, 1)), prefill(1, (6, 5))
    unknown = make_work(handle=9, token_ids=(5,), block_ids=(0,))
    executor.submit(SchedulerOutput(0, (new,), (first,)))
    executor.submit(SchedulerOutput(1, (), (decode(size), unknown)))
    steps: list[StepDone] = []
    while len(steps) < 3:
        output = executor.wait(math.inf)
        assert output is not None
        if not steps:  # only now is there room for one more
            executor.submit(SchedulerOutput(2, (other,), (decode(size + 1), later)))
        steps += output.steps
    assert [done.step_id for done in steps] == [0, 1, 2]
    assert [done.error for done in steps] == [None, "KeyError: 9", None]
    assert steps[0].device_s > 0.0
    assert steps[2].samples[1] == steps[0].samples[0]  # the same prompt
    executor.close()


def test_preempted_tokens_are_the_reference_s(replays, tmp_path, monkeypatch):
    """The whole engine with a step in flight: preempted requests get transformers' tokens."""
    model = make_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(profiler, "TIME_LIMIT_S", 0.0)
    monkeypatch.setattr(local, "LocalExecutor", functools.partial(LocalExecutor, is_async=True))
    params = fastserve.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompts = [PROMPT[:5], PROMPT, PROMPT[3:9]]
    with LLM(
        str(tmp_path),
        dtype="float32",
        device="cpu",
        num_threads=1,
        block_size=4,
        num_device_blocks=8,
        max_model_len=24,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        scheduling_policy="skip-join-mlfq",
        starvation_limit=0.5,
        preemption_mode="recompute",
    ) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
    assert replays
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    assert sum(item.num_preemptions for item in metrics) > 0
    assert sum(item.recomputed_tokens for item in metrics) > 0
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        assert ids == greedy(model, [*output.prompt_token_ids, *ids], 8)


def test_ladder():
    """Every batch size has a graph not much larger than it."""
    for most in (1, 3, 8, 100, 256):
        sizes = ladder(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        for rows in range(1, most + 1):
            fitting = min(size for size in sizes if size >= rows)
            assert fitting <= max(4, rows + 15)
    assert len(ladder(256)) < 30
