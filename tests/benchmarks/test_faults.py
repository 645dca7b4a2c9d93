"""The benchmark of faults, from its command line to its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import faults


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(300)
def test_one_fault_of_each_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine is found, harmed and replaced, and every stream has what it would have had."""
    output = tmp_path / "result.json"
    words = ["--faults", "1", "--streams", "8", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["faults", *words])
    assert faults.main() == 0
    result = json.loads(output.read_text())
    for kind in ("kill", "stop"):
        assert result[kind]["streams_open"] > 0
        assert result[kind]["streams_not_whole"] == 0
        assert result[kind]["streams_with_other_ids"] == 0
    assert result["term"]["requests"] > 0
    assert result["term"]["broken_off"] == 0
    assert result["term"]["wrong_statuses"] == 0
