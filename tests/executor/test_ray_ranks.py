"""Ranks as Ray's actors: what is said where it has no room, and where one fails before it joins."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.checkpoint.locate import BUNDLED
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.wire.joining import JoinError

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(300)]

ray = pytest.importorskip("ray", reason="Ray is not installed")
ROOT = str(Path(__file__).resolve().parents[2])
CONFIG = EngineConfig(
    device="cpu",
    tensor_parallel_size=2,
    pipeline_parallel_size=2,
    distributed_executor_backend="ray",
    master_addr="127.0.0.1",
)
COMMAND = (sys.executable, "-c", "raise SystemExit('not asked for')")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this process, with two CPUs, which leaves no token in the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": ROOT}},
        )
        yield
        ray.shutdown()


def open_starter(config: EngineConfig):
    """Place the ranks of a model."""
    from fastserve.executor.ray_ranks import RayStarter

    return RayStarter(config, BUNDLED, num_gpus=0, command=COMMAND, environment={})


@pytest.mark.usefixtures("cluster")
def test_a_cluster_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says what was asked for and what there is; nothing stays reserved."""
    monkeypatch.setattr("fastserve.executor.ray_ranks.PLACE_TIMEOUT_S", 2.0)
    with pytest.raises(ConfigError, match=r"no room within 2 s for 2 times 2 CPU, 0 GPU; free "):
        open_starter(CONFIG)
    wide = dataclasses.replace(CONFIG, tensor_parallel_size=4, pipeline_parallel_size=1)
    with pytest.raises(ConfigError, match=r"no room within 2 s for 4 times 1 CPU, 0 GPU; free "):
        open_starter(wide)
    assert ray.available_resources()["CPU"] == 2.0


@pytest.mark.usefixtures("cluster")
def test_a_rank_that_fails_before_it_joins_is_named_with_its_own_words() -> None:
    """Long before the time to join is over."""
    missing = dataclasses.replace(CONFIG, model="/no/such/model", pipeline_parallel_size=1)
    starter = open_starter(missing)
    try:
        with pytest.raises(JoinError, match=r"rank \d ended before all had joined: .*no such dir"):
            starter.start(0)
    finally:
        starter.close()
