"""The worker against transformers: the same tokens, however prompts are cut and blocks lie."""

from __future__ import annotations

import queue
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastserve.core.messages import (
    NO_TOKEN,
    Copy,
    CopyDirection,
    NewRequest,
    Sample,
    SchedulerOutput,
)
from fastserve.core.request import Handle, SamplingParams
from fastserve.executor import opening
from fastserve.executor.opening import Opened
from fastserve.executor.profiler import run_step
from fastserve.executor.worker import Worker
from fastserve.model.decoder_parts import Embedding
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from tests.checkpoints import (
    ARCHITECTURES,
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    greedy,
    make_checkpoint,
    write_old_dialect,
)
from tests.core.builders import make_work
from tests.executor.driver import GREEDY, Driven, Driver

NUM_BLOCKS = 96
BLOCK_SIZE = 8


def open_opened(path: Path, **settings) -> Opened:
    """Load a checkpoint into a worker whose free blocks are NaN."""
    config = EngineConfig(
        model=str(path),
        **{"device": "cpu", "block_size": BLOCK_SIZE, "num_device_blocks": NUM_BLOCKS, **settings},
    )
    return opening.open_worker(
        config,
        path,
        num_threads=1,
        eos_token_ids=frozenset({EOS_TOKEN_ID, 10**6}),  # some configs name ids there are not
        on_progress=lambda stage, fraction: None,
        is_poisoned=True,
    )


def open_worker(path: Path, **settings) -> Worker:
    """Load a checkpoint into a worker."""
    return open_opened(path, **settings).worker


def make_driver(worker: Worker, seed: int = 0) -> Driver:
    """Return a driver over the worker's whole pool, in random order."""
    return Driver(worker.execute, NUM_BLOCKS, worker.config.block_size, seed)


def random_prompt(length: int, seed: int) -> list[int]:
    """Return a prompt of random ids."""
    return [random.Random(seed * 1000 + i).randrange(2, VOCAB_SIZE) for i in range(length)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama: its directory and the oracle."""
    path = tmp_path_factory.mktemp("llama")
    return path, make_checkpoint(path, "llama")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    """64 greedy tokens of mixed, chunked prompts in one batch are those of transformers."""
    model = make_checkpoint(tmp_path, name)
    driver = make_driver(open_worker(tmp_path))
    requests = [
        Driven(random_prompt(length, seed=length), num_tokens=64, chunk=chunk)
        for length, chunk in ((1, 99), (23, 99), (37, 7), (64, 16), (5, 2))
    ]
    driver.run(*requests)
    for request in requests:
        assert request.output == greedy(model, request.ids, 64)


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3", "llama-linear-rope"])
def test_old_config_dialect(name, tmp_path):
    """A config.json written by transformers 4 gives the same tokens."""
    make_checkpoint(tmp_path, name)
    requests = []
    for is_old in (False, True):
        if is_old:
            write_old_dialect(tmp_path)
        requests.append(Driven(random_prompt(40, seed=1), num_tokens=20))
        make_driver(open_worker(tmp_path)).run(requests[-1])
    assert requests[0].output == requests[1].output


def test_prompt_logprobs_equal_transformers(llama):
    """Scores of prompt ids, chunked at odd places, are log_softmax of the oracle's logits."""
    path, model = llama
    prompt = random_prompt(41, seed=3)
    params = SamplingParams(temperature=0.0, prompt_logprobs=3, logprobs=2)
    request = Driven(prompt, params, num_tokens=4, chunk=9)
    stranger = Driven(random_prompt(17, seed=4), num_tokens=8, chunk=5)
    make_driver(open_worker(path)).run(stranger, request)

    with torch.inference_mode():
        expected = model(torch.tensor([request.ids])).logits[0].log_softmax(-1)
    scores = request.prompt_logprobs + [sample.logprobs for sample in request.samples]
    assert len(request.prompt_logprobs) == len(prompt) - 1
    for position, scored in enumerate(scores):
        assert scored is not None
        row, token_id = expected[position], request.ids[position + 1]
        assert scored.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert scored.rank == int((row > row[token_id]).sum()) + 1
        k = 3 if position < len(prompt) - 1 else 2
        assert scored.top_ids == row.topk(k).indices.tolist()
        assert scored.top_logprobs == pytest.approx(row.topk(k).values.tolist(), abs=1e-4)


def test_prompt_logprobs_survive_another_chunking(llama):
    """How a prompt is cut into chunks does not change its scores."""
    path, _ = llama
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    requests = [
        Driven(random_prompt(30, seed=9), params, num_tokens=1, chunk=chunk)
        for chunk in (30, 29, 10, 1)
    ]
    make_driver(open_worker(path)).run(*requests)
    whole = [score.logprob for score in requests[0].prompt_logprobs]
    assert len(whole) == 29
    for request in requests[1:]:
        cut = [score.logprob for score in request.prompt_logprobs]
        assert cut == pytest.approx(whole, abs=1e-4)


def test_samples_do_not_depend_on_the_batch(llama):
    """A seeded request draws the same tokens alone and among strangers."""
    path, _ = llama
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, seed=7)

    def subject() -> Driven:
        return Driven(random_prompt(12, seed=5), params, num_tokens=40, chunk=5)

    alone, among = subject(), subject()
    make_driver(open_worker(path)).run(alone)
    strangers = [
        Driven(random_prompt(9, seed), SamplingParams(temperature=2.0, seed=seed), num_tokens=30)
        for seed in range(4)
    ]
    make_driver(open_worker(path), seed=1).run(*strangers, among)
    assert alone.output == among.output
    assert len({tuple(stranger.output) for stranger in strangers}) == 4


def test_recomputed_request_draws_the_same_tokens(llama):
    """A request that is introduced again, ids and all, goes on as if nothing had happened."""
    path, _ = llama
    worker = open_worker(path)
    params = SamplingParams(temperature=1.0, seed=11, repetition_penalty=1.2)
    whole = Driven(random_prompt(10, seed=2), params, num_tokens=30)
    make_driver(worker).run(whole)

    ids = whole.ids[: 10 + 13]
    blocks = tuple(range(5, 9))
    plans = [
        SchedulerOutput(
            0,
            (NewRequest(Handle(77), 3, 10, params, ()),),
            (make_work(handle=77, epoch=3, num_tokens=23, token_ids=tuple(ids), block_ids=blocks),),
        )
    ]
    for position in range(23, 32):
        work = make_work(handle=77, epoch=3, start=position, token_ids=(whole.ids[position],))
        plans.append(SchedulerOutput(position, (), (work,)))
    again = [worker.execute(plan).samples[0].token_id for plan in plans]
    assert again == whole.output[13:23]


def test_cached_prefix_is_not_computed_again(llama):
    """A request that starts behind blocks of another goes on from their KV."""
    path, _ = llama
    worker = open_worker(path)
    prompt = random_prompt(21, seed=8)
    driver = make_driver(worker)
    first = Driven(prompt, num_tokens=6)
    driver.run(first)
    shared = tuple(first.blocks[:2])  # 16 ids
    fresh = tuple(block for block in range(NUM_BLOCKS) if block not in first.blocks)[:2]
    new = NewRequest(Handle(50), 0, len(prompt), GREEDY, tuple(prompt[:16]))
    work = make_work(
        handle=50, start=16, num_tokens=5, token_ids=tuple(prompt[16:]), block_ids=shared + fresh
    )
    done = worker.execute(SchedulerOutput(99, (new,), (work,)))
    assert done.samples[0].token_id == first.output[0]


def test_min_tokens_masks_eos_and_stop_ids(llama):
    """Until min_tokens are out neither EOS nor a stop id is drawn, whatever its bias."""
    path, _ = llama
    bias = {EOS_TOKEN_ID: 90.0, 5: 80.0}
    params = SamplingParams(
        temperature=0.0, logit_bias=bias, min_tokens=3, stop_token_ids=[5], max_tokens=9
    )
    request = Driven(random_prompt(4, seed=1), params, num_tokens=5)
    ignoring = SamplingParams(
        temperature=0.0, logit_bias=bias, min_tokens=3, ignore_eos=True, max_tokens=9
    )
    other = Driven(random_prompt(4, seed=1), ignoring, num_tokens=2)
    make_driver(open_worker(path)).run(request, other)
    assert not {EOS_TOKEN_ID, 5} & set(request.output[:3])
    assert request.output[3:] == [EOS_TOKEN_ID, EOS_TOKEN_ID]
    assert other.output == [EOS_TOKEN_ID, EOS_TOKEN_ID]


@pytest.mark.parametrize("temperature", [1e-300, 1.1e-5, 1e30, 1e300])
def test_no_temperature_is_too_much(llama, temperature):
    """Beside a banned id as well: a token is drawn, and never that one."""
    path, _ = llama
    params = SamplingParams(temperature=temperature, seed=1, min_tokens=9, max_tokens=9)
    request = Driven(random_prompt(4, seed=1), params, num_tokens=9)
    make_driver(open_worker(path)).run(request)
    assert len(request.output) == 9
    assert EOS_TOKEN_ID not in request.output


def test_repetition_penalty_counts_the_prompt_and_frequency_does_not(llama):
    """A strong repetition penalty avoids prompt ids; a strong frequency penalty only outputs."""
    path, model = llama
    prompt = random_prompt(20, seed=6)
    plain = greedy(model, [*prompt, 0], 1)[0]
    penalized = Driven(
        [*prompt, plain], SamplingParams(temperature=0.0, repetition_penalty=1e6), num_tokens=12
    )
    frequent = Driven(prompt, SamplingParams(temperature=0.0, frequency_penalty=2.0), num_tokens=1)
    make_driver(open_worker(path)).run(penalized, frequent)
    assert not set(penalized.output) & set(penalized.prompt)
    assert len(set(penalized.output)) == 12
    assert frequent.output == [plain]


def test_reading_a_strangers_block_shows(llama):
    """The poison works: a table that names a free block yields no number to draw from.

    The worker goes on: a step that follows before anybody has heard of it computes something.
    """
    path, _ = llama
    worker = open_worker(path)
    prompt = random_prompt(12, seed=1)
    params = SamplingParams(temperature=1.0, seed=1)
    new = NewRequest(Handle(0), 0, 12, params, ())
    first = make_work(num_tokens=11, token_ids=tuple(prompt[:11]), block_ids=(3, 4), sample=False)
    worker.execute(SchedulerOutput(0, (new,), (first,)))
    assert worker.poison is not None
    worker.poison.spoil([3])
    second = make_work(start=11, token_ids=(prompt[11],))
    assert worker.execute(SchedulerOutput(1, (), (second,))).samples == [Sample(NO_TOKEN)]
    third = make_work(start=12, token_ids=())
    assert worker.execute(SchedulerOutput(2, (), (third,))).samples == [Sample(NO_TOKEN)]


def test_plans_that_break_the_contract_are_refused(llama):
    """Work of an unknown epoch, or with ids missing, raises instead of guessing."""
    path, _ = llama
    worker = open_worker(path)
    new = NewRequest(Handle(0), 2, 4, GREEDY, ())
    stale = make_work(epoch=1, num_tokens=4, token_ids=(4, 5, 6, 7), block_ids=(0,))
    with pytest.raises(RuntimeError, match="epoch 1"):
        worker.execute(SchedulerOutput(0, (new,), (stale,)))
    gap = make_work(epoch=2, start=2, num_tokens=2, token_ids=(6, 7), block_ids=(0,))
    with pytest.raises(RuntimeError, match="0 ids known"):
        worker.execute(SchedulerOutput(1, (new,), (gap,)))


def moved(worker: Worker, direction: CopyDirection, src, dst) -> bool:
    """Copy blocks and wait for the end; returns whether it was done."""
    ends: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
    worker.move(Copy(5, direction, src, dst), lambda *end: ends.put(end))
    copy_id, is_done = ends.get(timeout=30)
    assert copy_id == 5
    return is_done


def test_a_request_goes_on_from_kv_that_was_on_the_host(llama):
    """Its blocks come back to other places, its own having been poisoned: the same tokens."""
    path, _ = llama
    worker = open_worker(path, preemption_mode="reactive", swap_space=0.001)
    prompt = random_prompt(21, seed=8)
    whole = Driven(prompt, num_tokens=8)
    make_driver(worker).run(whole)

    new = NewRequest(Handle(50), 0, len(prompt), GREEDY, ())
    first = make_work(handle=50, num_tokens=21, token_ids=tuple(prompt), block_ids=(7, 3, 5))
    outputs = [worker.execute(SchedulerOutput(0, (new,), (first,))).samples[0].token_id]
    for round_number, (src, places, dst) in enumerate(
        [((7, 3, 5), (9, 2, 3), (8, 4, 6)), ((8, 4, 6), (0, 1, 8), (40, 41, 42))]
    ):
        assert moved(worker, CopyDirection.SWAP_OUT, src, places)
        assert worker.poison is not None
        worker.poison.spoil(src)
        assert moved(worker, CopyDirection.SWAP_IN, places, dst)
        position = 21 + round_number
        work = make_work(handle=50, start=position, token_ids=(outputs[-1],), block_ids=dst)
        done = worker.execute(SchedulerOutput(position, (), (work,)))
        outputs.append(done.samples[0].token_id)
    assert outputs == whole.output[:3]
    worker.close()


def test_a_copy_to_where_there_is_no_host_tier_fails(llama, caplog):
    """It is no reason to end."""
    worker = open_worker(llama[0], swap_space=0.0)
    assert worker.kv.host.num_blocks == 0
    assert not moved(worker, CopyDirection.SWAP_OUT, (0,), (0,))
    assert len(caplog.messages) == 1
    worker.close()


def test_plan_without_work_only_forgets(llama):
    """A plan may carry nothing but handles to forget; unknown ones are no error."""
    path, _ = llama
    worker = open_worker(path)
    driver = make_driver(worker)
    driver.run(Driven(random_prompt(3, seed=1), num_tokens=1))
    assert len(worker.table) == 1
    done = worker.execute(SchedulerOutput(5, (), (), forget=(Handle(0), Handle(99))))
    assert done.samples == ()
    assert len(worker.table) == 0


def test_more_requests_than_rows_at_first(llama):
    """Row arrays grow with the number of requests, and rows are used again."""
    path, model = llama
    worker = open_worker(path, num_device_blocks=200)
    driver = make_driver(worker)
    for wave in range(2):
        requests = [
            Driven(random_prompt(3 + index % 5, seed=index), num_tokens=4) for index in range(40)
        ]
        driver.run(*requests)
        for request in requests[:: 13 - wave]:
            assert request.output == greedy(model, request.ids, 4)
    assert len(worker.table.blocks) == 64


def test_facts(llama):
    """The facts name the window, the pool and the bytes of a block."""
    path, _ = llama
    facts = open_opened(path, max_model_len=100).setup.facts
    assert (facts.max_model_len, facts.vocab_size) == (100, VOCAB_SIZE)
    assert facts.num_device_blocks == NUM_BLOCKS
    assert facts.block_bytes == 3 * 2 * BLOCK_SIZE * 2 * 8 * 4
    assert (facts.dtype, facts.device) == ("float32", "cpu")


def test_the_network_always_runs_in_inference_mode(llama, monkeypatch):
    """Plans and the profiler's steps, on whichever thread."""
    worker = open_worker(llama[0])
    modes = []
    embed = Embedding.__call__

    def watch(*arguments):
        modes.append(torch.is_inference_mode_enabled())
        return embed(*arguments)

    monkeypatch.setattr(Embedding, "__call__", watch)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(run_step, worker.execute, ((4, 0),), BLOCK_SIZE).result()
    make_driver(worker).run(Driven(random_prompt(5, seed=1), num_tokens=2))
    assert modes
    assert all(modes)


def test_flags_without_effect_are_refused(llama):
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match="--cpu-kernels native"):
        open_worker(llama[0], cpu_kernels="native", dtype="float16")


def test_dtypes_are_honoured(llama):
    """--dtype bfloat16 runs in bfloat16, and stays close to float32."""
    path, _ = llama
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    scores = []
    for dtype in ("float32", "bfloat16"):
        worker, setup = open_opened(path, dtype=dtype)
        request = Driven(random_prompt(30, seed=1), params, num_tokens=2, chunk=11)
        make_driver(worker).run(request)
        assert setup.facts.dtype == dtype
        assert worker.kv.device.tensor.dtype == getattr(torch, dtype)
        scores.append(torch.tensor([score.logprob for score in request.prompt_logprobs]))
    assert float((scores[0] - scores[1]).abs().mean()) < 0.1


def test_window_beyond_the_models_is_refused(llama, tmp_path):
    """--max-model-len beyond the positions, or beyond a sliding window, is a ConfigError."""
    path, _ = llama
    with pytest.raises(ConfigError, match="window is 256 tokens"):
        open_worker(path, max_model_len=257)
    make_checkpoint(tmp_path, "mistral", sliding_window=100)
    with pytest.raises(ConfigError, match="sliding window of 100"):
        open_worker(tmp_path, max_model_len=101)
    assert open_opened(tmp_path).setup.facts.max_model_len == 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused(llama):
    """--device cuda without one is a ConfigError of one line."""
    path, _ = llama
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        open_worker(path, device="cuda")
