"""`fastserve profile` writes what a server then accepts."""

from __future__ import annotations

import json

import pytest

from fastserve import cli
from fastserve.config import ConfigError
from fastserve.llm import LLM
from fastserve.provenance import output_path

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
