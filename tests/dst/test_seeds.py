"""Two hundred seeds of whole lives of engines: nothing lost, nothing leaked, and told if it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastserve.client.streams import RequestStream
from fastserve.core.memory.memory import KVCacheManager
from fastserve.wire.engine_messages import Add
from tests.dst.command import main, read_corpus, run_seeds
from tests.dst.outcome import STATS
from tests.dst.scenario import FaultKind
from tests.dst.world import Failure, run_seed

NUM_SEEDS = 200
BATCH = 50
RARE = {FaultKind.GIVEN_UP, FaultKind.WORDS_LOST}
RARE_STATS = {"num_fetched_blocks"}


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, BATCH))
def test_no_fault_loses_or_leaks_anything(first: int) -> None:
    """Exact answers, one end each, all places home; every kind of fault and of move happened."""
    report = run_seeds(range(first, first + BATCH))
    assert not report.failures, "\n\n".join(report.failures.values())
    seen, stats = report.outcome.faults, report.outcome.stats
    assert not [kind for kind in FaultKind if not seen[kind] and kind not in RARE]
    assert not [name for name in STATS if not stats[name] and name not in RARE_STATS]
    assert report.outcome.num_moves > 0
    assert report.outcome.num_requests > 90 * BATCH


def test_what_failed_once_does_not_fail_again() -> None:
    """The seeds of the corpus."""
    report = run_seeds(read_corpus())
    assert not report.failures, "\n\n".join(report.failures.values())


def test_a_seed_is_one_story_in_any_process() -> None:
    """Times, places and tokens are the same to the bit under another seed of Python's hashes."""
    code = "from tests.dst.world import run_seed; print(*(run_seed(s).sha256 for s in (3, 4)))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    mine = [run_seed(seed).sha256 for seed in (3, 4)]
    assert told.stdout.split() == mine
    assert mine[0] != mine[1]


def test_a_lost_token_is_told_with_the_story_of_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request that goes on one id too late repeats it: the seed, the request, what it went by."""
    as_command = RequestStream.as_command

    def forgets_the_last(
        stream: RequestStream, now: float, siblings: Sequence[RequestStream] = ()
    ) -> Add:
        ids = stream.output_token_ids
        stream.output_token_ids = ids[:-1]
        add = as_command(stream, now, siblings)
        stream.output_token_ids = ids
        return add

    monkeypatch.setattr(RequestStream, "as_command", forgets_the_last)
    with pytest.raises(
        Failure, match=r"^seed 8: BrokenPromiseError: request \d+: .* is not of"
    ) as e:
        run_seed(8)
    told = str(e.value).splitlines()
    number = told[0].split()[4].rstrip(":")
    assert f"request {number} comes" in told[1]
    assert sum(f"request {number} is given to replica" in line for line in told) >= 2


def test_a_leaked_place_is_told_by_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is 1, and the summary names the seed."""
    release = KVCacheManager.release

    def keeps_some(cache: KVCacheManager, request: object) -> None:
        if cache.pool.device.num_free % 7:
            release(cache, request)  # type: ignore[arg-type]

    summary = tmp_path / "s.json"
    assert main(["--seed", "5", "--summary", str(summary)]) == 0
    assert json.loads(summary.read_text())["failing_seeds"] == []
    monkeypatch.setattr(KVCacheManager, "release", keeps_some)
    assert main(["--seed", "5", "--summary", str(summary)]) == 1
    assert "seed 5: " in capsys.readouterr().out
    assert json.loads(summary.read_text())["failing_seeds"] == [5]
