"""The benchmark of short KV, from its command line to its result, with the bundled model."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks import short_kv
from benchmarks.short_kv_rig import AMPLE_POOL, MAX_NUM_SEQS, SHORT_POOL, Arm
from benchmarks.short_kv_workload import draw

FEW = ["--model", "demo", "--seconds", "0.5", "--capacity-requests", "12"]


def run(monkeypatch, tmp_path, *words):
    """Run from a command line and return what was written."""
    output = tmp_path / "result.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["short_kv", "--output", str(output), *words])
    assert short_kv.main() == 0
    return json.loads(output.read_text())


def test_every_seed_asks_for_the_same_work_in_another_order():
    """Or a way back would have another load than the way there."""
    one, other = (draw(30, 2.0, seed) for seed in (1, 2))
    for column in ("prompt_tokens", "output_tokens"):
        first, second = getattr(one, column), getattr(other, column)
        assert sorted(first) == sorted(second)
        assert not np.array_equal(first, second)
    assert one.rate == pytest.approx(2.0)
    assert other.rate == pytest.approx(2.0)
    assert (one.output_tokens >= 150).sum() == 6


def test_the_pool_is_for_four_of_mean_size_and_the_batch_for_more():
    """Any request fits alone, and the batch's requests do not fit together."""
    workload = draw(100, 1.0, 0)
    sizes = workload.prompt_tokens + workload.output_tokens
    pool = 16 * SHORT_POOL
    assert sizes.max() < pool
    assert 3 <= pool / sizes.mean() <= 4
    assert MAX_NUM_SEQS * sizes.mean() > 3 * pool


@pytest.mark.parametrize("text", ["fcfs", "nonsense/recompute", "fcfs/ideal", "fcfs/defer/slow"])
def test_an_arm_that_cannot_be_is_a_line_and_exit_code_2(text, monkeypatch, tmp_path, capsys):
    """Before anything is measured."""
    argv = ["short_kv", "--output", str(tmp_path / "out.json"), "--arms", text]
    monkeypatch.setattr(sys, "argv", argv)
    assert short_kv.main() == 2
    assert capsys.readouterr().err.startswith("error: --arms: ")


def test_all_arms_have_names_that_are_read_back():
    """What a result calls an arm is what runs it again."""
    assert [Arm.parse(str(arm)) for arm in short_kv.ARMS] == list(short_kv.ARMS)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_there_and_back_beside_the_simulator(monkeypatch, tmp_path, capsys):
    """What swaps does so live and simulated; what does not moves nothing."""
    arms = ["fcfs/recompute", "skip-join-mlfq/proactive", "skip-join-mlfq/proactive/unpaced"]
    found = run(monkeypatch, tmp_path, *FEW, "--arms", ",".join(arms))
    assert [each["arm"] for each in found["runs"]] == [*arms, *reversed(arms)]
    recomputes, *swapping = found["arms"]
    assert recomputes["num_swaps"] == recomputes["swap_out_bytes"] == 0
    for each in swapping:
        assert each["num_swaps"] > 0
        assert each["simulated"]["num_swaps"] > 0
        assert each["swap_in_bytes"] > 0
        assert each["num_failed_copies"] == 0
    assert found["link"]["paced"]["block_s"] > 2 * found["link"]["unpaced"]["block_s"]
    assert "what FCFS completes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_at_low_load_nothing_is_preempted_and_nothing_moves_for_need(monkeypatch, tmp_path):
    """Or the pool would not be one for everybody."""
    found = run(monkeypatch, tmp_path, *FEW, "--low-load", "--pairs", "2")
    assert len(found["ratios"]) == 2
    assert found["num_device_blocks"] == AMPLE_POOL
    assert found["blocks_copied_for_need"] == 0
    assert set(found["preemptions"].values()) == {0}
