"""The benchmark of live replicas, from its command line to its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import replicas


def test_a_policy_that_is_none_is_a_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is started."""
    monkeypatch.setattr(sys, "argv", ["replicas", "--policies", "fcfs,nonsense"])
    assert replicas.main() == 2
    assert capsys.readouterr().err == "error: --policies: no such policy: nonsense\n"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(300)
def test_two_replicas_beside_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both are given requests, live and simulated, and every start has profiles of its own."""
    output = tmp_path / "result.json"
    words = ["--output", str(output), "--model", "llama-17m", "--policies", "fcfs"]
    words += ["--seconds", "2", "--capacity-requests", "40"]
    monkeypatch.setattr(sys, "argv", ["replicas", *words])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert replicas.main() == 0
    found = json.loads(output.read_text())
    (policy,) = found["policies"]
    assert policy["requests"] == sum(run["requests"] for run in found["runs"])
    for run in found["runs"]:
        assert sum(run["placed"]) == run["requests"]
        assert min(run["placed"]) > 0
        assert abs(run["at_speed"]["error"]) < 1.0
    profiles = [json.dumps(each) for run in found["runs"] for each in run["profiles"]]
    assert len(set(profiles)) == len(profiles) == 4
