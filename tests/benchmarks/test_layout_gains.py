"""The benchmark of the gain over FCFS by layout, from its command line to its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import layout_gains


def test_a_gain_is_of_means_live_and_predicted() -> None:
    """FCFS over the paper's policy, of one layout."""

    def entry(policy: str, mean_s: float) -> dict[str, Any]:
        predicted = {"jct_s": {"mean": 2 * mean_s**2}}
        return {"layout": "2 × 1", "policy": policy, "jct_s": {"mean": mean_s},
                "simulated": predicted, "at_speed": predicted}  # fmt: skip

    entries = [entry(layout_gains.BASELINE, 3.0), entry(layout_gains.PAPER, 2.0)]
    assert layout_gains.gains(entries) == [
        {"layout": "2 × 1", "live": 1.5, "simulated": 2.25, "at_speed": 2.25}
    ]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(300)
def test_every_layout_beside_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each has runs of both policies, and a gain."""
    output = tmp_path / "result.json"
    words = ["--output", str(output), "--model", "llama-17m", "--seconds", "1"]
    monkeypatch.setattr(sys, "argv", ["layout_gains", *words, "--capacity-requests", "40"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert layout_gains.main() == 0
    found = json.loads(output.read_text())
    assert [gain["layout"] for gain in found["gains"]] == ["1 × 1", "2 × 1", "1 × 2"]
    assert len(found["runs"]) == 12
    assert all(gain[name] > 0.0 for gain in found["gains"] for name in ("live", "simulated"))
