"""What a served engine learned of answer lengths, and goes on with."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import sys
from pathlib import Path

import pytest

from fastserve.checkpoint import locate as checkpoint
from fastserve.client.async_engine import AsyncEngine
from fastserve.core.request import Arrival, FinishReason, SamplingParams
from fastserve.engine.length_file import LengthFile, length_path
from fastserve.launch.engine import open_engine
from fastserve.launch.server import open_async_engine
from fastserve.verbs.replay import replay
from tests.launch.engines import PROMPT, SMALL, generate, read, run

LEARNING = dataclasses.replace(SMALL, scheduling_policy="learned")
EAGER_PROCESS = """
import sys
from fastserve.engine import length_file

length_file.INTERVAL_S = 0.0
from fastserve.launch.__main__ import main

sys.exit(main())
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
