"""Lengths by name, with and without traces."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from experiments import lengths
from experiments.lengths import named_lengths, traces_folder


@pytest.mark.parametrize(("name", "median"), [("sharegpt", 287), ("alpaca", 49)])
def test_generated_lengths_have_the_stated_median(name: str, median: int) -> None:
    """Without traces lengths are drawn, and say so."""
    source = named_lengths(name, None)
    workload = source.arriving(2.0, seed=0, num_requests=4000)
    assert np.median(workload.output_tokens) == pytest.approx(median, rel=0.05)
    assert workload.rate == pytest.approx(2.0, rel=0.05)
    assert "generated" in source.origin


def test_a_seed_has_one_shape_at_every_rate() -> None:
    """Another rate moves arrivals and changes nothing else; another seed changes all."""
    source = named_lengths("alpaca", None)
    slow = source.arriving(1.0, seed=3, num_requests=50)
    fast = source.arriving(4.0, seed=3, num_requests=50)
    assert np.allclose(slow.arrived_at, 4 * fast.arrived_at)
    assert (slow.output_tokens == fast.output_tokens).all()
    other = source.arriving(1.0, seed=4, num_requests=50)
    assert not np.allclose(slow.arrived_at, other.arrived_at)


def test_traces_are_resampled(tmp_path: Path) -> None:
    """With traces, prompt and answer of a row stay together."""
    text = "arrived_at,prompt_tokens,output_tokens\n0,10,20\n1,30,40\n"
    (tmp_path / "alpaca_dev.csv.gz").write_bytes(gzip.compress(text.encode()))
    workload = named_lengths("alpaca", tmp_path).arriving(1.0, seed=0, num_requests=20)
    pairs = set(zip(workload.prompt_tokens, workload.output_tokens, strict=True))
    assert pairs == {(10, 20), (30, 40)}


def test_window_cuts() -> None:
    """No request is longer than the window."""
    source = named_lengths("sharegpt", None)
    workload = source.arriving(1.0, seed=0, num_requests=500, window=300)
    assert (workload.prompt_tokens + workload.output_tokens).max() == 300


def test_where_traces_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag wins over the environment, and that over the folder beside the checkout."""
    monkeypatch.setattr(lengths, "TRACES", tmp_path / "nowhere")
    monkeypatch.delenv("FASTSERVE_TRACES", raising=False)
    assert traces_folder() is None
    monkeypatch.setenv("FASTSERVE_TRACES", "/env")
    assert traces_folder() == Path("/env")
    assert traces_folder("/flag") == Path("/flag")
