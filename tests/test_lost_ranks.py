"""Ranks that are killed, stopped or cannot load: noticed at once, and no request is the worse."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import math
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.process_cpu import children_of
from fastserve.client.async_engine import AsyncEngine
from fastserve.client.streams import RequestStream
from fastserve.core.request import Arrival, FinishReason, SamplingParams
from fastserve.launch.server import open_async_engine
from fastserve.settings.option import ConfigError
from tests.checkpoints import VOCAB_SIZE, greedy, make_checkpoint
from tests.executor.ranks import config_of, open_ranks

pytestmark = pytest.mark.processes

NOTICED_S = 2.0
SILENT_S = 5.0
NUM_REQUESTS = 6
NUM_TOKENS = 100
PROMPT_TOKENS = 100
WINDOW = 256


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    """Make a tiny Llama."""
    path: Path = tmp_path_factory.mktemp("llama")
    return path, make_checkpoint(path, "llama", num_hidden_layers=4)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let this process and its children keep temporary files where nobody else does."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)


def is_there(pid: int) -> bool:
    """Whether a process runs."""
    try:
        _, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return False
    return rest.split()[0] != "Z"


def num_sockets() -> int:
    """Return how many sockets this process has."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists the folder
            links.append(os.readlink(entry))
    return sum(link.startswith("socket:") for link in links)


def shares_memory(pid: int) -> bool:
    """Whether a process has mapped memory that could outlive it."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return "/dev/shm/" in maps or "/SYSV" in maps


class Kill(NamedTuple):
    """A rank that was killed: when the API process was told, and when its engine was gone."""

    stage: int
    noticed_s: float
    gone_s: float


class Killer:
    """Kills ranks of a served model, and sees what is said of it."""

    def __init__(self, engine: AsyncEngine, log: pytest.LogCaptureFixture) -> None:
        self.engine = engine
        self.seen: set[int] = set()  # all processes there ever were
        self._log = log

    def ranks(self) -> list[int]:
        """Return the ranks that run now."""
        process = self.engine.process
        assert process is not None
        ranks = children_of(process.pid)
        assert not any(map(shares_memory, (process.pid, *ranks)))
        self.seen |= {process.pid, *ranks}
        return ranks

    async def kill(self, pid: int) -> Kill:
        """Kill a rank, wait until that is noticed, and return what is said of it, and when."""
        self._log.clear()
        link = self.engine.replicas[0].link
        assert link is not None
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: link.failure is not None)
        noticed_s = time.monotonic() - killed_at
        await until(lambda: self.engine.process is not link.process)
        gone_s = time.monotonic() - killed_at
        (record,) = [r for r in self._log.records if "starting it again" in r.getMessage()]
        assert noticed_s < NOTICED_S
        line = re.match(
            r"rank (\d) \(localhost, stage (\d) of 2, shard 0 of 1\) died \(killed by signal 9\) "
            r"at step \d+; last heard \d\.\d s ago; starting it again, \d+ requests go on$",
            record.getMessage(),
        )
        assert line is not None, record.getMessage()
        assert line[1] == line[2]
        return Kill(int(line[2]), noticed_s, gone_s)


class Reader:
    """Reads one stream to its end, beside the test."""

    def __init__(self, stream: RequestStream) -> None:
        self.ids: list[int] = []
        self.reason: FinishReason | None = None
        self.task = asyncio.create_task(self._read(stream))

    async def _read(self, stream: RequestStream) -> None:
        async for update in stream:
            assert self.reason is None, "news after the terminal update"
            self.ids += [sample.token_id for sample in update.samples]
            self.reason = update.finish_reason


def prompts(seed: int) -> list[list[int]]:
    """Return the prompts of one round."""
    rng = random.Random(seed)
    return [
        [rng.randrange(2, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_REQUESTS)
    ]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a stream or a snapshot will say."""
    while not condition():
        await asyncio.sleep(0.002)


async def kill_in_every_phase(
    path: Path, model: transformers.PreTrainedModel, log: pytest.LogCaptureFixture, seed: int
) -> list[Kill]:
    """Serve, kill a rank in prefill, in decode and while KV is swapped, at last the engine."""
    rng = random.Random(seed)
    config = config_of(
        path, pp=2, max_model_len=WINDOW, num_device_blocks=80, max_num_batched_tokens=8,
        scheduling_policy="skip-join-mlfq", starvation_limit=0.05, swap_bandwidth=2e-4,
        enable_prefix_caching=False,
    )  # fmt: skip
    sockets_before = num_sockets()
    engine = open_async_engine(config)
    killer = Killer(engine, log)
    kills = []
    await engine.start()
    try:
        await engine.ready()
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        given = prompts(seed)
        readers = [Reader(engine.submit(Arrival(prompt, params))) for prompt in given]

        async def kill_one() -> None:
            kills.append(await killer.kill(rng.choice(killer.ranks())))
            await engine.ready()

        await until(lambda: any(reader.ids for reader in readers))
        assert not all(reader.ids for reader in readers), "none is left that prefills"
        await kill_one()
        begun_with = sum(len(reader.ids) for reader in readers)
        await until(lambda: sum(len(reader.ids) for reader in readers) > begun_with + 20)
        assert any(reader.ids and reader.reason is None for reader in readers), "none decodes"
        await kill_one()
        await until(lambda: engine.stats is not None and is_swapping(engine))
        await kill_one()
        await asyncio.gather(*(reader.task for reader in readers))
        for prompt, reader in zip(given, readers, strict=True):
            assert reader.reason is FinishReason.LENGTH
            assert reader.ids == greedy(model, prompt + reader.ids, NUM_TOKENS)
        killer.ranks()
        engine.kill()
    finally:
        await engine.close()
    assert len(killer.seen) == 4 * 3
    await until(lambda: not any(map(is_there, killer.seen)))
    assert num_sockets() == sockets_before
    assert not list(Path(tempfile.gettempdir()).iterdir())
    return kills


def is_swapping(engine: AsyncEngine) -> bool:
    """Whether KV is on its way between the tiers, by the latest snapshot of this process."""
    stats = engine.stats
    return stats is not None and stats.scheduler.device_blocks_moving > 0


def run(body: Callable[[], Awaitable[None]], limit_s: float) -> None:
    """Run a coroutine function with a time limit."""

    async def limited() -> None:
        async with asyncio.timeout(limit_s):
            await body()

    asyncio.run(limited())


def test_killed_ranks_cost_no_request_a_token(
    llama: tuple[Path, transformers.PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    """In prefill, in decode, while KV moves: named, started again, gone on, nothing left behind."""

    async def body() -> None:
        await kill_in_every_phase(*llama, caplog, seed=3)

    caplog.set_level(logging.WARNING)
    run(body, 110.0)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ranks_killed_sixty_times_cost_no_request_a_token(
    llama: tuple[Path, transformers.PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    """Of the first stage and of the last."""
    kills: list[Kill] = []

    async def body() -> None:
        for seed in range(20):
            kills.extend(await kill_in_every_phase(*llama, caplog, seed))

    caplog.set_level(logging.WARNING)
    run(body, 2900.0)
    stages, *times_s = zip(*kills, strict=True)
    assert len(stages) == 60
    assert min(stages.count(0), stages.count(1)) > 10
    told = [f"median {median(each):.3f} s, at most {max(each):.3f} s" for each in times_s]
    print(f"of stages {stages.count(0)} + {stages.count(1)} killed")  # noqa: T201
    print(f"noticed: {told[0]}; the engine was gone: {told[1]}")  # noqa: T201


@contextmanager
def nobody_is_left() -> Iterator[None]:
    """Hold that no child of this process outlives the block."""
    before = set(children_of(os.getpid()))
    yield
    assert not set(children_of(os.getpid())) - before


def test_a_stopped_rank_is_noticed(llama: tuple[Path, transformers.PreTrainedModel]) -> None:
    """It says nothing, though its connection is there; waiting is over, and so is the rank."""
    with nobody_is_left():
        before = set(children_of(os.getpid()))
        executor = open_ranks(llama[0], 1, 2)
        try:
            _, last = sorted(set(children_of(os.getpid())) - before)
            stopped_at = time.monotonic()
            os.kill(last, signal.SIGSTOP)
            with pytest.raises(RuntimeError, match=r"rank \d .* is silent before its first step"):
                executor.wait(math.inf)
            assert time.monotonic() - stopped_at < SILENT_S
        finally:
            executor.close()


PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207


def stop_thread(thread_id: int) -> None:
    """Stop one thread of a process as a debugger does; it goes on when this thread ends."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if ptrace(request, thread_id, None, None):
            pytest.skip(f"threads cannot be stopped here: {os.strerror(ctypes.get_errno())}")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_computes_for_ever_is_noticed(
    llama: tuple[Path, transformers.PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    """It is heard, for its other threads live: its step does not end, and all start again."""

    async def body() -> None:
        config = config_of(llama[0], pp=2, max_model_len=WINDOW, num_device_blocks=80)
        engine = open_async_engine(config, engine_timeout_s=3.0)
        killer = Killer(engine, caplog)
        await engine.start()
        try:
            await engine.ready()
            params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
            first = Reader(engine.submit(Arrival([5, 6], params)))
            await first.task
            await until(lambda: engine.stats is not None and engine.stats.num_requests == 0)
            stop_thread(random.Random(1).choice(killer.ranks()))  # which waits for its next step
            given = prompts(1)
            readers = [Reader(engine.submit(Arrival(prompt, params))) for prompt in given]
            await asyncio.gather(*(reader.task for reader in readers))
            for prompt, reader in zip(given, readers, strict=True):
                assert reader.ids == greedy(llama[1], prompt + reader.ids, 20)
            killer.ranks()
        finally:
            await engine.close()
        assert len(killer.seen) == 3 * 2
        assert not [pid for pid in killer.seen if is_there(pid)]

    caplog.set_level(logging.WARNING)
    run(body, 390.0)
    (line,) = [r.getMessage() for r in caplog.records if "starting it again" in r.getMessage()]
    assert re.match(r"step \d+ has not ended for \d+\.\d s; .* were expected of it; ", line)


def test_a_rank_that_cannot_load_ends_all_with_its_message(
    llama: tuple[Path, transformers.PreTrainedModel], tmp_path: Path
) -> None:
    """A weight is missing in the last stage: the others, who have theirs, do not wait."""
    for file in llama[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with nobody_is_left(), pytest.raises(ConfigError, match=r"has no weights '.*layers\.3\.mlp"):
        open_ranks(tmp_path, 1, 2)
