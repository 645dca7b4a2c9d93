"""`fastserve profile` writes what a server then accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve import cli
from fastserve.host.provenance import output_path, write_result
from fastserve.llm import LLM
from fastserve.settings.option import ConfigError

SMALL = ("--max-model-len", "64", "--max-num-seqs", "2", "--num-threads", "1")


def test_a_profile_can_be_used(tmp_path, capsys):
    """What was measured is printed, written, and taken up by an engine of the same shape."""
    path = tmp_path / "made" / "profile.json"
    assert cli.main(["profile", *SMALL, "--output", str(path)]) == 0
    said = capsys.readouterr().out
    assert "Step times of demo" in said
    assert str(path) in said
    coefficients = json.loads(path.read_text())["cost_model"]
    assert coefficients["base_s"] + coefficients["decode_seq_s"] > 0
    flags = {"max_model_len": 64, "max_num_seqs": 2, "num_threads": 1, "profile": str(path)}
    with LLM("demo", **flags):
        pass
    with pytest.raises(ConfigError, match="made for another setup: block_size"):
        LLM("demo", block_size=8, **flags)


def test_a_profile_is_not_made_from_a_profile(tmp_path, capsys):
    """--profile names a file to read; this command has nothing to read."""
    assert cli.main(["profile", "--profile", str(tmp_path / "x.json")]) == 2
    assert "--output names the file" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    """Before a measurement is better than after it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output"):
        output_path(str(tmp_path / "file" / "below.json"))
    assert cli.main(["profile", "--output", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert cli.main(["profile", "--output", "/proc/profile.json"]) == 2
    assert "--output /proc/profile.json: cannot be written" in capsys.readouterr().err


def test_asking_whether_a_file_can_be_written_leaves_none(tmp_path):
    """And keeps what is in one that exists."""
    kept = tmp_path / "kept.json"
    kept.write_text("before")
    output_path(str(kept))
    assert kept.read_text() == "before"
    output_path(str(tmp_path / "new.json"))
    assert not (tmp_path / "new.json").exists()


def test_a_cache_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch, capsys):
    """Without --output the profile goes there."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    no_build = ("--cpu-kernels", "torch")  # which could not be kept there either
    assert cli.main(["profile", *SMALL, *no_build]) == 2
    assert "error: without --output: " in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_one_line():
    """A disk may fill up meanwhile."""
    with pytest.raises(ConfigError, match="/dev/full: No space left"):
        write_result(Path("/dev/full"), {})
