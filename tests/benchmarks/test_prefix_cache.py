"""The benchmark of what KV that is there already is worth."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import prefix_cache
from benchmarks.prefix_cache import ANSWER_TOKENS, ARMS, NUM_TURNS, TURN_TOKENS


def test_a_conversation_fits_its_device_and_what_comes_between_does_not():
    """Or nothing would be evicted, or everything in the middle of a turn."""
    pool = prefix_cache.NUM_BLOCKS * prefix_cache.BLOCK_SIZE
    between = prefix_cache.OTHER_TOKENS * prefix_cache.OTHERS_PER_TURN
    assert NUM_TURNS * (TURN_TOKENS + ANSWER_TOKENS) < pool < between


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(300)
def test_both_parts(monkeypatch, tmp_path, capsys):
    """What is found was there before: never at first, nor on a device that others have filled."""
    output = tmp_path / "result.json"
    argv = ["prefix_cache", "--model", "llama-17m", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*argv, "--", "--num-threads", "1"])
    assert prefix_cache.main() == 0
    found = json.loads(output.read_text())
    shared = found["shared"]
    assert shared["first"]["median_cached_tokens"] == 0
    assert shared["second"]["median_cached_tokens"] == 992
    turns = found["conversation"]["turns"]
    assert list(turns) == list(ARMS)
    assert [turn["median_cached_tokens"] for turn in turns["device only"]] == [0] * NUM_TURNS
    said = [turn * (TURN_TOKENS + ANSWER_TOKENS) for turn in range(NUM_TURNS)]
    cached = [turn["median_cached_tokens"] for turn in turns["host tier"]]
    assert cached == [(tokens - 1) // 16 * 16 if tokens else 0 for tokens in said]
    assert "TTFT, device only / host tier: " in capsys.readouterr().out
