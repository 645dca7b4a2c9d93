"""What a replica finds in its environment."""

from __future__ import annotations

import pytest

from fastserve.launch.children import replica_environment
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError


@pytest.mark.parametrize(
    ("named", "own"), [(None, ["0,1", "2,3"]), ("5,3,7,1", ["5,3", "7,1"]), ("", ["", ""])]
)
def test_replicas_have_devices_of_their_own(
    monkeypatch: pytest.MonkeyPatch, named: str | None, own: list[str]
) -> None:
    """As many as its ranks for each, of those that the environment names; of none, none."""
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    config = EngineConfig(data_parallel_size=2, tensor_parallel_size=2)
    found = [replica_environment(config, replica) for replica in range(2)]
    assert found == [{"CUDA_VISIBLE_DEVICES": devices} for devices in own]


def test_replicas_are_not_left_without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than they need are one line; a CPU needs none, and one engine takes what there is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match=r"--data-parallel-size 2: 2 devices are needed, .* 1$"):
        replica_environment(EngineConfig(data_parallel_size=2), 0)
    assert replica_environment(EngineConfig(data_parallel_size=2, device="cpu"), 0) == {}
    assert replica_environment(EngineConfig(), 0) == {}
