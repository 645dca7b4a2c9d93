"""The composition root: engines over the real executor, in this process and in one of their own."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from fastserve import LLM, launch
from fastserve.checkpoint import locate as checkpoint
from fastserve.client.async_engine import AsyncEngine
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.streams import RequestStream
from fastserve.core.request import Arrival, FinishReason, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.engine.length_file import LengthFile, length_path
from fastserve.launch import open_async_engine, open_engine, open_tokenizer
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.verbs.replay import replay
from fastserve.wire.child import spawn
from tests import tiny_tokenizers
from tests.checkpoints import make_checkpoint

T = TypeVar("T")
SMALL = EngineConfig(model="demo", num_device_blocks=32, num_threads=1)
PROMPT = [10, 20, 30, 40, 50]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measure step times once for this module, and leave the user's profiles alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def run(test: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function with a time limit."""

    async def limited() -> T:
        async with asyncio.timeout(100):
            return await test()

    return asyncio.run(limited())


def generate(engine: Engine, params: SamplingParams) -> list[int]:
    """Run one request alone to its end."""
    engine.add(Arrival(PROMPT, params))
    ids: list[int] = []
    while engine.num_requests:
        ids += [sample.token_id for update in engine.step() for sample in update.samples]
    return ids


async def read(stream: RequestStream) -> tuple[list[int], FinishReason | None]:
    """Read a stream to its end."""
    ids: list[int] = []
    reason = None
    async for update in stream:
        ids += [sample.token_id for sample in update.samples]
        reason = update.finish_reason
    return ids, reason


def test_info_is_what_was_measured() -> None:
    """The facts of the executor and of the model's files are in EngineInfo."""
    engine, info = open_engine(SMALL)
    engine.close()
    assert info.model == "demo"
    assert info.num_device_blocks == 32
    assert info.max_request_tokens == 32 * info.block_size < info.max_model_len
    assert info.device == "cpu"
    assert info.eos_token_ids
    assert info.sampling_defaults["temperature"] > 0


def test_threads_of_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As told, else as many as there are cores that nothing else needs; one at least."""
    monkeypatch.setattr(launch, "num_cores", lambda: 4)
    assert launch.count_threads(EngineConfig()) == 4
    assert launch.count_threads(EngineConfig(), reserved_cores=1) == 3
    assert launch.count_threads(EngineConfig(num_threads=7), reserved_cores=1) == 7
    assert launch.count_threads(EngineConfig(pipeline_parallel_size=2)) == 2
    monkeypatch.setattr(launch, "num_cores", lambda: 1)
    assert launch.count_threads(EngineConfig(), reserved_cores=1) == 1


def test_the_tokenizers_end_ends_a_text_too(tmp_path: Path) -> None:
    """Another id than the model's files name, of the model's tokenizer or of one named."""
    model, other = tmp_path / "model", tmp_path / "other"
    make_checkpoint(model, "llama")  # ends by 1
    other.mkdir()
    settings = {"eos_token": "<|user|>"}
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), other)
    (other / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = dataclasses.replace(SMALL, model=str(model), max_num_seqs=2)
    for tokenizer, expected in ((None, {1}), (str(other), {1, 2})):
        engine, info = open_engine(dataclasses.replace(config, tokenizer=tokenizer))
        engine.close()
        assert info.eos_token_ids == expected


def test_a_tokenizer_of_another_format_is_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """tokenizer.model alone: the model is served for token ids, and a line says why."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert open_tokenizer(dataclasses.replace(SMALL, model=str(tmp_path))) is None
    assert "tokenizer.model is not read" in caplog.text
    assert "only token ids can be prompts" in caplog.text


def test_generation_config_can_be_left_out() -> None:
    """With `vllm` the model's sampling defaults are not used."""
    engine, info = open_engine(
        EngineConfig(model="demo", num_device_blocks=32, num_threads=1, generation_config="vllm")
    )
    engine.close()
    assert info.sampling_defaults == {}


def test_loading_tells_what_it_is_at() -> None:
    """Progress goes from 0 to 1 in each stage."""
    seen: list[tuple[str, float]] = []
    engine, _ = open_engine(SMALL, lambda stage, fraction: seen.append((stage, fraction)))
    engine.close()
    assert seen
    assert all(stage and 0.0 <= fraction <= 1.0 for stage, fraction in seen)


def test_a_journal_holds_setting_facts_and_plans(tmp_path: Path) -> None:
    """Each life of an engine begins with its setting; a second life follows in the same file."""
    path = tmp_path / "journal.jsonl"
    config = EngineConfig(model="demo", num_device_blocks=32, num_threads=1, journal=str(path))
    for _ in range(2):
        engine, _ = open_engine(config)
        generate(engine, SamplingParams(seed=1, max_tokens=3, ignore_eos=True))
        engine.close()
    kinds = [json.loads(line)[0] for line in path.read_text(encoding="utf-8").splitlines()]
    assert kinds.count("open") == kinds.count("add") == 2
    assert kinds[0] == "open"
    assert kinds.count("update") == 6


@pytest.mark.parametrize("swap_space", [0.0, 0.01])
def test_an_engine_with_a_host_tier_swaps_and_is_replayed(
    swap_space: float, tmp_path: Path
) -> None:
    """Its journal has both tiers and the price of the link; without host memory it recomputes."""
    path = tmp_path / "journal.jsonl"
    config = EngineConfig(
        model="demo", num_device_blocks=16, max_model_len=128, max_num_seqs=3, num_threads=1,
        scheduling_policy="mlfq", mlfq_quantum=1e-3, preemption_mode="reactive",
        swap_space=swap_space, swap_bandwidth=0.5, journal=str(path),
    )  # fmt: skip
    engine, info = open_engine(config)
    for seed in range(6):
        params = SamplingParams(seed=seed, max_tokens=60, ignore_eos=True)
        engine.add(Arrival(range(10 + seed, 50 + seed), params))
    while engine.num_requests:
        engine.step()
    stats = engine.stats().scheduler
    engine.close()
    assert info.block_bytes * info.num_host_blocks <= swap_space * 2**30
    assert (stats.num_swaps > 0) == (stats.host_blocks_total > 0) == (swap_space > 0.0)
    assert stats.host_blocks_total == info.num_host_blocks
    opening = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert opening[5:7] == [16, info.num_host_blocks]
    costs = opening[4]
    assert (costs["copy_block_s"] >= info.block_bytes / 0.5e9) == (swap_space > 0.0)
    assert replay(path) == 0


def test_a_journal_that_cannot_be_begun_is_refused() -> None:
    """A full disk is an error of the setting while the engine is loaded."""
    config = EngineConfig(model="demo", num_device_blocks=32, num_threads=1, journal="/dev/full")
    with pytest.raises(ConfigError, match="--journal /dev/full: No space left"):
        open_engine(config)


def test_a_restarted_engine_goes_on_without_a_journal(caplog: pytest.LogCaptureFixture) -> None:
    """Requests wait for it, and a full disk is no reason to let them down: one line says so."""
    config = dataclasses.replace(SMALL, journal="/dev/full")
    engine, _ = open_engine(config, is_restart=True)
    assert len(generate(engine, SamplingParams(max_tokens=5, ignore_eos=True))) == 5
    engine.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the engine goes on without its journal: --journal /dev/full: No space left on device"
    ]


def test_a_setting_that_cannot_be_honoured_closes_the_executor() -> None:
    """The error is the configuration's, and nothing keeps running behind it."""
    config = EngineConfig(
        model="demo", num_device_blocks=32, num_threads=1, enable_chunked_prefill=False,
        max_num_batched_tokens=128,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="max-num-batched-tokens"):
        open_engine(config)


def test_a_model_without_a_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    """No tokenizer.json is no tokenizer; one that is named must be there."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert open_tokenizer(EngineConfig(model=str(tmp_path))) is None
    named = open_tokenizer(EngineConfig(model=str(tmp_path), tokenizer="demo"))
    assert named is not None
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        open_tokenizer(EngineConfig(tokenizer=str(tmp_path)))


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line, at the start, for LLM too; single added tokens beyond it are only told of."""
    backend = tiny_tokenizers.byte_level(300)
    tiny_tokenizers.save(backend, tmp_path)
    config = EngineConfig(model=str(tmp_path))
    for size in (300, 299):
        (tmp_path / "config.json").write_text(f'{{"vocab_size": {size}}}')
        if size == 300:
            assert open_tokenizer(config) is not None
            continue
        with pytest.raises(ConfigError, match=r"has 300 ids and the model 299; --tokenizer names"):
            open_tokenizer(config)
        with pytest.raises(ConfigError, match="has 300 ids"):
            LLM(str(tmp_path))
    assert not caplog.records
    backend.add_tokens(["<pad>"])
    tiny_tokenizers.save(backend, tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    assert open_tokenizer(config) is not None
    assert "none of 1 added tokens, '<pad>' for one" in caplog.text


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"KMP_BLOCKTIME": "5"}, "1000 5"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None None"),
    ],
)
def test_threads_of_an_idle_engine_stop_spinning(asked: dict[str, str], expected: str) -> None:
    """Offline use too bounds how long threads spin, unless the user asks for something else."""
    code = (
        "import os; from fastserve import LLM; LLM(num_device_blocks=4).close();"
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


@pytest.mark.processes
def test_a_killed_engine_goes_on_with_the_same_tokens() -> None:
    """SIGKILL in mid-stream: what follows equals an undisturbed run, id for id."""
    params = SamplingParams(
        seed=5, temperature=1.0, top_k=20, max_tokens=200, ignore_eos=True, prompt_logprobs=1
    )
    engine, _ = open_engine(SMALL)
    undisturbed = generate(engine, params)
    engine.close()
    assert len(undisturbed) == 200

    async def body() -> tuple[list[int], FinishReason | None]:
        served = open_async_engine(SMALL)
        await served.start()
        try:
            await served.ready()
            stream = served.submit(Arrival(PROMPT, params))
            num_scores = 0
            async for update in stream:
                num_scores += len(update.prompt_logprobs)
                if len(stream.output_token_ids) >= 40:
                    break
            assert served.process is not None
            served.process.send_signal(signal.SIGKILL)
            async for update in stream:
                num_scores += len(update.prompt_logprobs)
                reason = update.finish_reason
            assert num_scores == len(PROMPT) - 1  # none is lost, none comes twice
            assert 'engine_restarts_total{engine="0",model_name="demo"} 1.0' in text_of(served)
            return stream.output_token_ids, reason
        finally:
            await served.close()

    assert run(body) == (undisturbed, FinishReason.LENGTH)


@pytest.mark.processes
def test_a_killed_replica_loses_no_token_of_a_hundred_streams() -> None:
    """Two replicas of a real model, one is killed: all ids equal those of one undisturbed run."""
    config = EngineConfig(model="demo", num_device_blocks=256, num_threads=1, deterministic=True)
    arrivals = [
        Arrival([10 + n, 20, 30], SamplingParams(seed=n, top_k=20, max_tokens=24, ignore_eos=True))
        for n in range(100)
    ]
    engine, _ = open_engine(config)
    handles = [engine.add(arrival) for arrival in arrivals]
    undisturbed: dict[int, list[int]] = {handle: [] for handle in handles}
    while engine.num_requests:
        for update in engine.step():
            undisturbed[update.handle] += [sample.token_id for sample in update.samples]
    engine.close()

    async def body() -> None:
        served = open_async_engine(dataclasses.replace(config, data_parallel_size=2))
        await served.start()
        try:
            await asyncio.gather(*(replica.ready() for replica in served.replicas))
            streams = [served.submit(arrival) for arrival in arrivals]
            while len(streams[0].output_token_ids) < 5:
                await asyncio.sleep(0)  # lets the reader run
            assert served.process is not None
            served.process.send_signal(signal.SIGKILL)
            ended = await asyncio.gather(*map(read, streams))
            assert ended == [(undisturbed[handle], FinishReason.LENGTH) for handle in handles]
            assert 'engine_restarts_total{engine="0",model_name="demo"} 1.0' in text_of(served)
            name = 'fastserve:requests_resumed_total{engine="1"'
            (resumed,) = [s for s in text_of(served).splitlines() if s.startswith(name)]
            assert float(resumed.split()[-1]) > 0
            await served.replicas[0].ready()
            again = [served.submit(arrival) for arrival in arrivals[:4]]
            first = served.replicas[0].link
            assert first is not None
            assert sum(first.has(stream.number) for stream in again) == 2
            assert await asyncio.gather(*map(read, again)) == ended[:4]
        finally:
            await served.close()

    run(body)


@pytest.mark.parametrize(
    ("named", "own"), [(None, ["0,1", "2,3"]), ("5,3,7,1", ["5,3", "7,1"]), ("", ["", ""])]
)
def test_replicas_have_devices_of_their_own(
    monkeypatch: pytest.MonkeyPatch, named: str | None, own: list[str]
) -> None:
    """As many as its ranks for each, of those that the environment names; of none, none."""
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    config = EngineConfig(data_parallel_size=2, tensor_parallel_size=2)
    found = [launch.replica_environment(config, replica) for replica in range(2)]
    assert found == [{"CUDA_VISIBLE_DEVICES": devices} for devices in own]


def test_replicas_are_not_left_without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than they need are one line; a CPU needs none, and one engine takes what there is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match=r"--data-parallel-size 2: 2 devices are needed, .* 1$"):
        launch.replica_environment(EngineConfig(data_parallel_size=2), 0)
    assert launch.replica_environment(EngineConfig(data_parallel_size=2, device="cpu"), 0) == {}
    assert launch.replica_environment(EngineConfig(), 0) == {}


def test_replicas_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the server's; one thread at least, and as many as told."""
    monkeypatch.setattr(launch, "num_cores", lambda: 9)
    counts = [launch.count_threads(EngineConfig(data_parallel_size=n), 1) for n in (1, 2, 3, 32)]
    assert counts == [8, 4, 2, 1]
    told = EngineConfig(data_parallel_size=2, num_threads=7)
    assert launch.count_threads(told, 1) == 7


LEARNING = dataclasses.replace(SMALL, scheduling_policy="learned")
EAGER_PROCESS = """
import sys
from fastserve.engine import length_file

length_file.INTERVAL_S = 0.0
from fastserve import LLM, launch

sys.exit(launch.main())
"""


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the demo model's answer lengths are kept, of which there are none yet."""
    directory = str(checkpoint.locate("demo").resolve())
    path = length_path("demo", directory)
    path.unlink(missing_ok=True)
    return path


def num_known(path: Path) -> list[int | None]:
    """Return how many answers each engine of a journal knew when it began."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [line[-1] and line[-1]["num_ended"] for line in lines if line[0] == "open"]


@pytest.mark.processes
def test_a_served_model_goes_on_with_what_it_learned(lengths: Path, tmp_path: Path) -> None:
    """From one server to the next, whose journal says so and is replayed plan for plan."""
    journal = tmp_path / "journal.jsonl"
    config = dataclasses.replace(LEARNING, journal=str(journal), max_num_seqs=2)

    async def body(seeds: range) -> None:
        served = open_async_engine(config)
        await served.start()
        try:
            await served.ready()
            streams = [
                served.submit(
                    Arrival(PROMPT, SamplingParams(seed=seed, max_tokens=seed, ignore_eos=True))
                )
                for seed in seeds
            ]
            await asyncio.gather(*map(read, streams))
        finally:
            await served.close()

    for seeds in (range(2, 22), range(2, 12)):
        run(lambda: body(seeds))  # noqa: B023 - it has ended by then
    assert num_known(journal) == [0, 20]
    assert json.loads(lengths.read_text(encoding="utf-8"))["lengths"]["num_ended"] == 30
    assert replay(journal) == 0


@pytest.mark.processes
def test_a_killed_engine_goes_on_with_what_it_learned(lengths: Path, tmp_path: Path) -> None:
    """SIGKILL in mid-stream: the next one knows the answers so far, and the stream goes on."""
    journal = tmp_path / "journal.jsonl"
    config = dataclasses.replace(LEARNING, journal=str(journal))
    params = SamplingParams(seed=5, temperature=1.0, top_k=20, max_tokens=400, ignore_eos=True)
    engine, _ = open_engine(SMALL)
    undisturbed = generate(engine, params)
    engine.close()

    async def body() -> tuple[list[int], FinishReason | None]:
        served = AsyncEngine(config, (sys.executable, "-c", EAGER_PROCESS, "--engine-fd"))
        await served.start()
        try:
            await served.ready()
            stream = served.submit(Arrival(PROMPT, params))
            first = served.submit(Arrival(PROMPT, SamplingParams(seed=1, max_tokens=3)))
            await read(first)
            while not lengths.exists():  # while the other one runs
                await asyncio.sleep(0)
            assert len(stream.output_token_ids) < 400
            assert served.process is not None
            served.process.send_signal(signal.SIGKILL)
            _, reason = await read(stream)
            return stream.output_token_ids, reason
        finally:
            await served.close()

    assert run(body) == (undisturbed, FinishReason.LENGTH)
    assert num_known(journal) == [0, 1]
    assert json.loads(lengths.read_text(encoding="utf-8"))["lengths"]["num_ended"] == 2
    assert replay(journal) == 0


def test_offline_use_neither_knows_nor_changes_what_servers_learned(
    lengths: Path, tmp_path: Path
) -> None:
    """A benchmark's figure must not depend on what was run before it."""
    kept = LengthFile(lengths, str(checkpoint.locate("demo").resolve()), 0.0)
    kept.model.add((), 7)
    kept.close()
    before = lengths.read_bytes()
    journal = tmp_path / "journal.jsonl"
    engine, _ = open_engine(dataclasses.replace(LEARNING, journal=str(journal)))
    generate(engine, SamplingParams(seed=1, max_tokens=3, ignore_eos=True))
    engine.close()
    assert num_known(journal) == [None]
    assert lengths.read_bytes() == before
    assert replay(journal) == 0


FAILING_PROCESS = """
import sys
from fastserve import LLM, launch
from fastserve.executor.model_runner import ModelRunner

run = ModelRunner.run

def run_and_fail(self, works, states):
    done = run(self, works, states)
    if any(666 in state.token_ids for state in states):
        raise FloatingPointError("in the middle of a step")
    return done

ModelRunner.run = run_and_fail
sys.exit(launch.main())
"""


@pytest.mark.processes
def test_a_failing_step_of_a_real_worker_leaves_the_engine_process_whole() -> None:
    """Again and again: its request ends with the reason, the next one as if it had been alone."""
    params = SamplingParams(seed=5, temperature=1.0, top_k=20, max_tokens=20, ignore_eos=True)
    engine, _ = open_engine(SMALL)
    undisturbed = generate(engine, params)
    engine.close()

    async def body() -> None:
        served = AsyncEngine(SMALL, (sys.executable, "-c", FAILING_PROCESS, "--engine-fd"))
        await served.start()
        try:
            await served.ready()
            process = served.process
            for _ in range(3):
                *_, last = [
                    update async for update in served.submit(Arrival([666, *PROMPT], params))
                ]
                assert last.finish_reason is FinishReason.ERROR
                assert last.error == "FloatingPointError: in the middle of a step"
                ids, reason = await read(served.submit(Arrival(PROMPT, params)))
                assert (ids, reason) == (undisturbed, FinishReason.LENGTH)
            assert served.process is process
            while served.stats is None or served.stats.scheduler.device_blocks_used:
                await asyncio.sleep(0)
        finally:
            await served.close()

    run(body)


@pytest.mark.processes
def test_requests_share_the_engine_process_under_pressure() -> None:
    """Requests that outgrow the pool together preempt each other and still get their own ids."""

    def params(seed: int) -> SamplingParams:
        return SamplingParams(seed=seed, temperature=0.0, max_tokens=100, ignore_eos=True)

    engine, _ = open_engine(SMALL)
    alone = generate(engine, params(0))
    engine.close()

    async def body() -> None:
        served = open_async_engine(SMALL)
        await served.start()
        try:
            await served.ready()
            streams = [served.submit(Arrival(PROMPT, params(seed))) for seed in range(8)]
            results = await asyncio.gather(*map(read, streams))
            assert results == [(alone, FinishReason.LENGTH)] * 8
            while served.stats is None or served.stats.num_requests:
                await asyncio.sleep(0)
            assert served.stats.scheduler.num_preemptions > 0
            assert served.stats.scheduler.device_blocks_used == 0
        finally:
            await served.close()

    run(body)


@pytest.mark.processes
def test_a_model_that_is_not_there_is_one_line() -> None:
    """The engine process says what the user must know, and ends."""

    async def body() -> None:
        served = open_async_engine(EngineConfig(model="/no/such/model"))
        await served.start()
        with pytest.raises(EngineDeadError, match="no such directory"):
            await served.ready()
        await served.close()

    run(body)


@pytest.mark.processes
def test_no_library_has_a_say_in_the_exit_status(tmp_path: Path) -> None:
    """What is left to do when a child ends is nothing, so nothing can go wrong with it."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os; atexit.register(os.abort)")
    python_path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    environment = {**os.environ, "PYTHONPATH": python_path}
    command = (sys.executable, "-P", "-m", "fastserve.launch", "--engine-fd")
    process, ours = spawn(command, environment)
    ours.close()
    assert process.wait(30) == 0


def text_of(engine: AsyncEngine) -> str:
    """Return the metrics as text."""
    return engine.metrics.render()[0].decode()
