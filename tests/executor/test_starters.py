"""What starts ranks: children, other hosts, Ray, as the settings say."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastserve.executor.distributed import DistributedExecutor
from fastserve.executor.host_ranks import open_host_ranks
from fastserve.executor.joined_ranks import JoinedRank, JoinedRanks, meeting_point
from fastserve.executor.starters import open_starter
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.wire.cluster_secret import VARIABLE, ClusterSecret
from fastserve.wire.driver_link import LEFT
from fastserve.wire.handshake import Hello
from fastserve.wire.joining import JoinError, Listener, join
from fastserve.wire.links import free_port
from tests.checkpoints import make_checkpoint
from tests.executor.ranks import COMMAND, ENVIRONMENT, arrivals, config_of, open_local, run

SECRET = ClusterSecret(b"a secret of these tests")


@pytest.fixture
def listener() -> Iterator[Listener]:
    """One that waits for ranks 1 and 2."""
    made = Listener("127.0.0.1", 0, SECRET, {}, {1, 2})
    yield made
    made.close()


def test_ranks_are_handed_over_with_what_their_host_said(listener: Listener) -> None:
    """How many share a host is counted by its address; the model is where that host has it."""
    joined = JoinedRanks(listener)
    with ThreadPoolExecutor() as pool:
        hellos = [Hello(rank=rank, local_rank=rank + 4, model_dir="/m") for rank in (1, 2)]
        connections = [pool.submit(join, listener.address, SECRET, hello, 10.0) for hello in hellos]
        rank = JoinedRank(*joined.take(2))
        place = rank.place
        assert (place.local_rank, place.num_local_ranks, place.model_dir) == (6, 2, "/m")
        assert place.host.endswith(" at 127.0.0.1")
        rank.kill()
        assert connections[1].result().recv(9) == b""
        assert rank.end() == "its connection ended"
        for number, connection in zip((1, 2), connections, strict=True):
            connection.result().close()
            joined.peer(number).connection.close()


def test_a_closed_starter_waits_for_nobody(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that wait for ranks are let go as soon as the engine ends."""
    monkeypatch.setattr("fastserve.wire.joining.CHECK_S", 0.05)
    joined = JoinedRanks(listener)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(joined.take, rank) for rank in (1, 2)]
        joined.close()
        for future in waiting:
            with pytest.raises(JoinError, match="the engine has ended"):
                future.result(10)


def test_where_ranks_meet_is_a_url() -> None:
    """An address of IPv6 is put in brackets."""
    assert meeting_point("10.0.0.1", 80) == "tcp://10.0.0.1:80"
    assert meeting_point("fd00::1", 80) == "tcp://[fd00::1]:80"


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_asked_for_where_it_is_missing() -> None:
    """The line says how to install it."""
    config = EngineConfig(distributed_executor_backend="ray")
    with pytest.raises(ConfigError, match=r"Ray is not installed: pip install 'fastserve\[ray\]'"):
        open_starter(config, Path(), (), {}, 0)


@pytest.mark.slow
@pytest.mark.processes
def test_two_hosts_compute_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over loopback: the second host's rank joins, runs, and leaves when the engine does."""
    monkeypatch.setenv(VARIABLE, SECRET.reveal())
    make_checkpoint(tmp_path, "llama", num_hidden_layers=4)
    local = open_local(tmp_path)
    try:
        expected = run(local, arrivals())
    finally:
        local.close()
    first = config_of(
        tmp_path, pp=2, nnodes=2, master_addr="127.0.0.1", master_port=free_port("127.0.0.1")
    )
    second = dataclasses.replace(first, node_rank=1)
    host, ranks = open_host_ranks(second, tmp_path, COMMAND, ENVIRONMENT)
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(host.serve, ranks)
        executor = DistributedExecutor(
            first,
            tmp_path,
            open_starter(first, tmp_path, COMMAND, ENVIRONMENT, 0),
            eos_token_ids=frozenset(),
            on_progress=lambda stage, fraction: None,
        )
        try:
            found = run(executor, arrivals())
        finally:
            executor.close()
        assert serving.result(30) == LEFT
    assert found.tokens == expected.tokens
    assert found.max_in_flight == 2
