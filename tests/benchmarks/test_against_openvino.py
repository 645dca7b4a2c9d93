"""FastServe against OpenVINO: the arithmetic of a run, and a machine without OpenVINO."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import against_openvino, contenders
from benchmarks.against_openvino import as_cells, count_equal_first_tokens, figures, measure_round
from benchmarks.contender import Contender
from benchmarks.small_model import LARGER

RATES = {
    "fastserve": 20.0,
    "openvino": 10.0,
    "fastserve_one_thread": 8.0,
    "openvino_one_thread": 8.0,
}


class FakeContender(Contender):
    """Answers at once, and notes what it was asked."""

    def __init__(self, name: str, asked: list[tuple[str, str]], token: int = 7) -> None:
        self.name = name
        self._asked, self._token = asked, token

    def ask(self, question: str, **details: Any) -> dict[str, Any]:
        """Return the rate of this name."""
        self._asked.append((self.name, question))
        if question == "first_tokens":
            return {"tokens": [self._token, *[1] * (len(details["prompts"]) - 1)]}
        if question == "floors":
            return {"copy_gb_per_s": 50.0, "product_gflop_per_s": 1000.0}
        return {"tokens_per_s": RATES[self.name], "step_ms_p50": 1.0}


def test_turns_change_their_order_from_round_to_round() -> None:
    """Row by row, so that what drifts is shared; floors are FastServe's process' to measure."""
    asked: list[tuple[str, str]] = []
    all_four = {name: FakeContender(name, asked) for name in RATES}
    for index in (0, 1):
        measure_round(all_four, index, output_len=2)
    prefills = [name for name, question in asked if question == "prefill"]
    assert prefills == [*RATES, *reversed(RATES)]
    floors = [name for name, question in asked if question == "floors"]
    assert floors == ["fastserve", "fastserve_one_thread", "fastserve_one_thread", "fastserve"]


def test_figures_of_a_run() -> None:
    """Every row has its ratios, and its share of a floor of the same run."""
    all_four = {name: FakeContender(name, []) for name in RATES}
    rounds = [measure_round(all_four, index, output_len=2) for index in range(3)]
    asked = list(against_openvino.questions())
    found = figures(LARGER, asked, rounds)
    assert [row["row"] for row in found["rows"]] == [each.row for each in asked]
    for row in found["rows"]:
        assert row["fastserve_over_openvino"] == {"median": 2.0, "least": 2.0, "most": 2.0}
        assert row["all_threads_over_one"]["fastserve"]["median"] == 2.5
        assert row["all_threads_over_one"]["openvino"]["median"] == 1.25
    first = found["rows"][0]
    assert first["floor_is_of_a"] == "copy"
    assert first["share_of_floor"]["fastserve"] == pytest.approx(
        20 / first["floor_tokens_per_s"], abs=2e-3
    )
    assert len(list(as_cells("a model", found))) == len(asked)


def test_contenders_that_compute_something_else_are_told() -> None:
    """One prompt of all has another token in one of them."""
    same = {name: FakeContender(name, []) for name in RATES}
    assert count_equal_first_tokens(same, 100) == against_openvino.CHECKED_PROMPTS
    other = {**same, "openvino": FakeContender("openvino", [], token=8)}
    assert count_equal_first_tokens(other, 100) == against_openvino.CHECKED_PROMPTS - 1


def test_without_openvino_a_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It says what to run, before anything is loaded."""
    monkeypatch.setattr(contenders, "ROOT", tmp_path)
    monkeypatch.setattr(contenders, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(sys, "argv", ["against_openvino"])
    assert against_openvino.main() == 2
    assert capsys.readouterr().err == "error: no python: run benchmarks/openvino/setup first\n"


def test_the_result_of_another_model_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run that was cut off goes on with the models that it lacks."""
    output = tmp_path / "result.json"
    output.write_text(json.dumps({"models": {"llama-125m": {"rows": []}}}))
    measured: list[str] = []

    def measure(name: str, *_: int) -> dict[str, Any]:
        measured.append(name)
        floors = {"fastserve": {"copy_gb_per_s": 1.0, "product_gflop_per_s": 1.0}}
        told = {"threads": 2, "machine": {"cpu": "a processor"}, "load_average_at_start": 0.0}
        return {**told, "first_tokens_equal": "16 of 16", "floors": floors, "rows": []}

    words = ["--models", "llama-17m", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["against_openvino", *words])
    monkeypatch.setattr(against_openvino, "find_openvino", lambda: None)
    monkeypatch.setattr(against_openvino, "measure_model", measure)
    assert against_openvino.main() == 0
    assert measured == ["llama-17m"]
    assert set(json.loads(output.read_text())["models"]) == {"llama-125m", "llama-17m"}
