"""The plot: a PNG with something in it."""

from __future__ import annotations

import struct

from fastserve.sim.job import run_job
from fastserve.sim.plot import plot_runs
from tests.sim.test_job import make_job


def test_a_plot_is_a_png_of_its_size(tmp_path):
    """Two policies, three panels, one file."""
    runs = {}
    for policy in ("fcfs", "skip-join-mlfq"):
        result = run_job(make_job(policy, has_timeline=True))
        runs[policy] = (result.outcome, result.timeline)
    path = tmp_path / "plot.png"
    plot_runs(path, runs, "a title", 64)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (960, 1140)
    assert len(content) > 20_000
