"""An engine beside a process that keeps one core busy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import beside_neighbour, contenders
from benchmarks.beside_neighbour import as_cells, busy_core, figures
from benchmarks.process_cpu import PROC, read_stat


@pytest.mark.skipif(not PROC.is_dir(), reason="Linux only")
def test_a_neighbour_computes_on_its_core_and_goes() -> None:
    """It is bound before it says so, takes processor time, and is gone afterwards."""
    core = max(os.sched_getaffinity(0))
    with busy_core(core) as pid:
        assert os.sched_getaffinity(pid) == {core}
        before = read_stat(pid).cpu_s
        while read_stat(pid).cpu_s == before:  # a neighbour that waits would never end this
            pass
    assert not (PROC / str(pid)).exists()


def test_ratios_are_of_one_round() -> None:
    """The machine slows down by half from the first round to the second."""

    def steps(ms: float) -> dict[str, float]:
        return {"step_ms_p50": ms, "step_ms_mean": 2 * ms}

    rounds = [
        {"FastServe": {"alone": steps(alone), "beside": steps(3 * alone)}} for alone in (5.0, 10.0)
    ]
    found = figures(rounds)
    assert found["FastServe"]["alone"] == {"step_ms_p50": 7.5, "step_ms_mean": 15.0}
    for ratio in found["FastServe"]["beside_over_alone"].values():
        assert ratio == {"median": 3.0, "least": 3.0, "most": 3.0}
    assert list(as_cells(found)) == [
        ("FastServe", "7.50", "22.50", "3.00 (3.00–3.00)", "15.00", "45.00", "3.00 (3.00–3.00)")
    ]


def test_without_openvino_a_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It says what to run, before anything is loaded."""
    monkeypatch.setattr(contenders, "ROOT", tmp_path)
    monkeypatch.setattr(contenders, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(sys, "argv", ["beside_neighbour"])
    assert beside_neighbour.main() == 2
    assert capsys.readouterr().err == "error: no python: run benchmarks/openvino/setup first\n"
