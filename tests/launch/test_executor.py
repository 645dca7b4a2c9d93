"""Threads: how many an operation has, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastserve.launch import executor
from fastserve.launch.executor import count_threads
from fastserve.settings.engine import EngineConfig


def test_threads_of_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As told, else as many as there are cores that nothing else needs; one at least."""
    monkeypatch.setattr(executor, "num_cores", lambda: 4)
    assert count_threads(EngineConfig()) == 4
    assert count_threads(EngineConfig(), reserved_cores=1) == 3
    assert count_threads(EngineConfig(num_threads=7), reserved_cores=1) == 7
    assert count_threads(EngineConfig(pipeline_parallel_size=2)) == 2
    monkeypatch.setattr(executor, "num_cores", lambda: 1)
    assert count_threads(EngineConfig(), reserved_cores=1) == 1


def test_replicas_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the server's; one thread at least, and as many as told."""
    monkeypatch.setattr(executor, "num_cores", lambda: 9)
    counts = [count_threads(EngineConfig(data_parallel_size=n), 1) for n in (1, 2, 3, 32)]
    assert counts == [8, 4, 2, 1]
    told = EngineConfig(data_parallel_size=2, num_threads=7)
    assert count_threads(told, 1) == 7


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"KMP_BLOCKTIME": "5"}, "1000 5"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None None"),
    ],
)
def test_threads_of_an_idle_engine_stop_spinning(asked: dict[str, str], expected: str) -> None:
    """Offline use too bounds how long threads spin, unless the user asks for something else."""
    code = (
        "import os; from fastserve import LLM; LLM(num_device_blocks=4).close();"
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
