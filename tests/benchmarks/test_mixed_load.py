"""The benchmark of policies under one workload, from its command line to its result."""

from __future__ import annotations

import json
import os
import sys

import pytest

from benchmarks import mixed_load


def arguments(monkeypatch, tmp_path, *words):
    """Read a command line."""
    argv = ["mixed_load", "--output", str(tmp_path / "result.json"), *words]
    monkeypatch.setattr(sys, "argv", argv)
    return mixed_load.parse_arguments()


@pytest.mark.parametrize(
    ("words", "load", "max_num_seqs", "requests"),
    [
        ([], 1.2, 4, 400),
        (["--low-load"], 0.3, 64, 400),
        (["--trace", "t.csv"], 1.2, 4, 300),
        (["--low-load", "--load", "0.5", "--max-num-seqs", "9", "--requests", "7"], 0.5, 9, 7),
    ],
)
def test_defaults(words, load, max_num_seqs, requests, monkeypatch, tmp_path):
    """Load, batch and length of a run follow the kind of run; each may be said."""
    args = arguments(monkeypatch, tmp_path, *words)
    assert (args.load, args.max_num_seqs, args.requests) == (load, max_num_seqs, requests)
    assert args.policies == ["fcfs", "skip-join-mlfq"]


@pytest.mark.parametrize("policies", ["fcfs,nonsense", "fcfs,mlfq,fcfs"])
def test_policies_are_judged_before_anything_is_measured(policies, monkeypatch, tmp_path, capsys):
    """An unknown name and one named twice are a line and exit code 2."""
    argv = ["mixed_load", "--output", str(tmp_path / "out.json"), "--policies", policies]
    monkeypatch.setattr(sys, "argv", argv)
    assert mixed_load.main() == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_random_model_and_flags_behind_the_dashes_reach_the_server(monkeypatch, tmp_path):
    """They come before the benchmark's own."""
    words = ["--model", "llama-17m", "--", "--starvation-limit", "1"]
    bench = mixed_load.Bench(arguments(monkeypatch, tmp_path, *words), tmp_path)
    flags = " ".join(bench.flags("mlfq"))
    assert flags.startswith(f"{tmp_path}/llama-17m --scheduling-policy mlfq --max-num-seqs 4 ")
    assert " --load-format dummy --starvation-limit 1 " in flags


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(300)
def test_three_policies_there_and_back(monkeypatch, tmp_path, capsys):
    """Mirrored order, ratios over the first, nothing lost, and the user's cache left alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "untouched"))
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{i},{20 + i},{3 + i},{i % 2}\n" for i in range(8))
    trace.write_text("arrived_at,prompt_tokens,output_tokens,client_id\n" + rows)
    output = tmp_path / "result.json"
    argv = ["mixed_load", "--policies", "fcfs,mlfq,skip-join-mlfq", "--trace", str(trace)]
    argv += ["--capacity", "300", "--output", str(output), "--", "--num-threads", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    assert mixed_load.main() == 0
    found = json.loads(output.read_text())
    names = ["fcfs", "mlfq", "skip-join-mlfq"]
    assert [run["policy"] for run in found["runs"]] == [*names, *reversed(names)]
    assert [each["policy"] for each in found["policies"]] == names
    assert [each["requests"] for each in found["policies"]] == [16] * 3
    assert [each["lost"] for each in found["policies"]] == [0] * 3
    assert list(found["ratios"]) == names[1:]
    assert found["lengths"] == "trace.csv"
    assert found["requests_per_s"] == pytest.approx(1.2 * 300 / 6.5)
    assert "JCT, fcfs / mlfq: mean " in capsys.readouterr().out
    assert not os.path.exists(tmp_path / "untouched")
