"""`fastserve reproduce`: listing, choosing and running experiments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.cli import main
from fastserve.settings.option import ConfigError
from fastserve.verbs import reproduce


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the user's cache, and no trace is needed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*args: str, output: Path) -> dict[str, object]:
    """Run one quick experiment and return its JSON."""
    folder = ["--output", str(output), "--workers", "1", "--quick"]
    assert main(["reproduce", *args, *folder]) == 0
    (written,) = output.glob("*.json")
    assert written.with_suffix(".png").stat().st_size > 1000
    loaded: dict[str, object] = json.loads(written.read_text(encoding="utf-8"))
    return loaded


def test_e1_is_what_the_hand_works_out(tmp_path: Path) -> None:
    """The three jobs end when a calculation by hand says."""
    saved = run("e1", output=tmp_path / "results")
    figures = saved["figures"]
    assert isinstance(figures, dict)
    for row in figures.values():
        assert row["mean_s"] == pytest.approx(row["by_hand_s"], abs=0.005)


def test_e2_runs_quickly_without_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model and kind of lengths gives a curve that rises with the rate."""
    from experiments import lengths

    monkeypatch.setattr(lengths, "TRACES", tmp_path / "nowhere")
    monkeypatch.delenv("FASTSERVE_TRACES", raising=False)
    saved = run("e2_rate", output=tmp_path / "results")
    assert saved["is_quick"]
    assert "generated" in json.dumps(saved["settings"])
    figures = saved["figures"]
    assert isinstance(figures, dict)
    assert len(figures) == 7
    low, high = figures["opt-13b, sharegpt"]["fcfs"]["mean_s_per_token"]["mean"]
    assert 0 < low < high


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "/proc/x"], "--output /proc/x: "),
        (["--workers", "0"], "--workers: 0 is below"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    """Before anything runs."""
    assert main(["reproduce", "e1", "--quick", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastserve: error: {words}")
    assert said.count("\n") == 1


def test_nothing_named_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Every experiment is listed with what it is."""
    assert main(["reproduce"]) == 0
    printed = capsys.readouterr().out
    for name in reproduce.find(reproduce.FOLDER):
        assert name in printed
    assert "three jobs" in printed


def test_experiments_come_in_order(tmp_path: Path) -> None:
    """E10 comes after E9, and helpers are no experiments."""
    for name in ("e10_b.py", "e9_a.py", "engine.py", "harness.py"):
        (tmp_path / name).write_text('"""E."""\n', encoding="utf-8")
    assert list(reproduce.find(tmp_path)) == ["e9_a", "e10_b"]


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The message names what there is."""
    assert main(["reproduce", "e99"]) == 2
    assert "no experiment 'e99'; there are: e1_three_jobs" in capsys.readouterr().err


def test_without_a_checkout(tmp_path: Path) -> None:
    """An installed package says that the experiments are in the source checkout."""
    with pytest.raises(ConfigError, match="source checkout"):
        reproduce.find(tmp_path / "experiments")
