"""The experiments' harness: cache, workers, files."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from experiments import harness
from experiments.harness import Lab, Point, Setup
from fastserve.sim.workload import Workload

SETUP = Setup("opt-13b", "a100-40g")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Return a lab with a cache and results of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    console = Console(file=io.StringIO(), width=200)
    return Lab(output=tmp_path / "results", num_workers=1, console=console)


def point(policy: str = "fcfs", output_tokens: int = 5, **changes: Any) -> Point:
    """Return a few requests under a policy."""
    workload = Workload(
        arrived_at=np.array([0.0, 0.5, 1.0]),
        prompt_tokens=np.array([40, 10, 300]),
        output_tokens=np.full(3, output_tokens),
    )
    config = SETUP.config(policy, **changes)
    return Point({"policy": policy, "seed": 0}, config, SETUP.machine(), workload)


def said(lab: Lab) -> str:
    """Return what the lab printed."""
    assert isinstance(lab.console.file, io.StringIO)
    return lab.console.file.getvalue()


def test_a_point_runs_once(lab: Lab) -> None:
    """The second run of a point comes from the cache and is the same."""
    points = [point("fcfs"), point("skip-join-mlfq")]
    first = lab.run("t", points)
    assert "2 points, 2 to simulate" in said(lab)
    assert lab.run("t", points) == first
    assert "2 points, 0 to simulate" in said(lab)


def test_an_interrupted_run_resumes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished before an interrupt is not run again."""
    simulated: list[Point] = []

    def interrupted(one: Point) -> dict[str, Any]:
        if len(simulated) == 1:
            raise KeyboardInterrupt
        simulated.append(one)
        return real(one)

    real = harness.simulate_point
    points = [point(output_tokens=count) for count in (2, 3, 4)]
    with monkeypatch.context() as patched:
        patched.setattr(harness, "simulate_point", interrupted)
        patched.setattr(harness, "code_hash", lambda: "the same code")
        with pytest.raises(KeyboardInterrupt):
            lab.run("t", points)
    monkeypatch.setattr(harness, "code_hash", lambda: "the same code")
    lab.run("t", points)
    assert "3 points, 2 to simulate" in said(lab)


def test_workers_find_the_same(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes give the results of a run in this one, in order."""
    points = [point("fcfs"), point("skip-join-mlfq", output_tokens=9)]
    here = lab.run("t", points)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert dataclasses.replace(lab, num_workers=2).run("t", points) == here


@pytest.mark.parametrize(
    "other",
    [
        point("skip-join-mlfq"),
        point(output_tokens=6),
        point(starvation_limit=7.0),
        dataclasses.replace(point(), is_closed_loop=True),
        dataclasses.replace(point(), machine=Setup("opt-13b", "a100-80g").machine()),
    ],
)
def test_key_depends_on_content(other: Point) -> None:
    """Whatever can change the result changes the key; a label does not."""
    assert other.key("code") != point().key("code")
    assert dataclasses.replace(point(), labels={"other": 1}).key("code") == point().key("code")
    assert point().key("new code") != point().key("code")


def test_save_writes_json_and_png(lab: Lab) -> None:
    """A result has provenance, settings and five digits; what does not exist is null."""
    figures = {"x": 1.23456789, "none": math.nan, "rows": [2.0]}
    lab.save("t", settings={"seeds": [0]}, figures=figures, picture=Figure())
    saved = json.loads((lab.output / "t.json").read_text(encoding="utf-8"))
    assert saved["figures"] == {"x": 1.2346, "none": None, "rows": [2.0]}
    assert saved["settings"] == {"seeds": [0]}
    assert {"commit", "machine", "command", "simulator"} <= saved["provenance"].keys()
    assert (lab.output / "t.png").read_bytes().startswith(b"\x89PNG")


def test_quick_labs_are_small() -> None:
    """A quick lab has one seed, few requests and the ends of a grid."""
    lab = Lab(is_quick=True)
    assert len(lab.seeds()) == 1
    assert lab.sized(500) < 50
    assert lab.some([1, 2, 3]) == [1, 3]
    full = Lab()
    assert (len(full.seeds()), full.sized(500), full.some([1, 2, 3])) == (3, 500, [1, 2, 3])
