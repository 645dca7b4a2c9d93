"""The ranks of one host: they join the engine of another, and the next one when it has ended."""

from __future__ import annotations

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastserve.executor.host_ranks import HostRanks, local_ranks, open_host_ranks, route_of
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.wire.cluster_secret import VARIABLE, ClusterSecret
from fastserve.wire.joining import JoinError, Listener, Peer
from fastserve.wire.links import free_port

SECRET = ClusterSecret(b"a secret of these tests")
TERMS = {"version": "1.0"}
# Says on its socket what surrounds it, and leaves as it is told.
RANK = """
import json, os, socket, sys
connection = socket.socket(fileno=int(sys.argv[1]))
names = ("GLOO_SOCKET_IFNAME", "MARK", "FASTSERVE_CLUSTER_SECRET")
connection.sendall(json.dumps({name: os.environ.get(name) for name in names}).encode() + b"\\n")
sys.exit(0 if connection.recv(9) == b"leave" else 1)
"""
CONFIG = EngineConfig(
    tensor_parallel_size=2,
    pipeline_parallel_size=2,
    nnodes=2,
    node_rank=1,
    master_addr="127.0.0.1",
)


def host_at(address: tuple[str, int]) -> HostRanks:
    """Return a host whose ranks are the script above."""
    return HostRanks(
        address=address,
        secret=SECRET,
        terms=TERMS,
        model_dir="/models/llama",
        command=(sys.executable, "-c", RANK),
        environment={"MARK": "ours"},
    )


def gather(address: tuple[str, int]) -> dict[int, Peer]:
    """Be an engine until its ranks are there."""
    return Listener(*address, SECRET, TERMS, {2, 3}).gather(20)


@pytest.mark.processes
def test_ranks_join_run_and_join_the_next_engine() -> None:
    """An engine that ends without a word is followed by another; one that says so is not."""
    address = ("127.0.0.1", free_port("127.0.0.1"))
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(host_at(address).serve, (2, 3))
        peers = gather(address)
        for peer in peers.values():
            with peer.connection as connection, connection.makefile("rb") as stream:
                said = json.loads(stream.readline())
                assert (said["GLOO_SOCKET_IFNAME"], said["MARK"]) == ("lo", "ours")
                assert peer.hello.model_dir == "/models/llama"
        assert [peers[rank].hello.local_rank for rank in (2, 3)] == [0, 1]
        for peer in gather(address).values():
            with peer.connection as connection:
                connection.sendall(b"leave")
                assert connection.makefile("rb").readline()
        assert serving.result() == 0


def test_an_engine_that_refuses_ends_the_host() -> None:
    """All ranks of a host are told the same, and it is raised."""
    address = ("127.0.0.1", free_port("127.0.0.1"))
    other = dataclasses.replace(host_at(address), terms={"version": "2.0"})
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(other.serve, (2, 3))
        with pytest.raises(ConfigError, match=r"version is 2\.0 there, 1\.0 here"):
            gather(address)
        with pytest.raises(JoinError, match=r"version is 2\.0 there, 1\.0 here"):
            serving.result()


def test_neighbours_share_a_host() -> None:
    """Each has an equal part of the ranks, in order."""
    assert list(local_ranks(CONFIG)) == [2, 3]
    assert list(local_ranks(dataclasses.replace(CONFIG, node_rank=0))) == [0, 1]


def test_hosts_need_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one there is no server over several hosts; the line says where it is looked for."""
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(
        ConfigError, match=rf"--nnodes 2: needs --cluster-secret-file or {VARIABLE}"
    ):
        open_host_ranks(CONFIG, EngineConfig, (), {})  # type: ignore[arg-type]


def test_tensors_take_the_interface_of_an_address() -> None:
    """An address without one leaves the choice to torch."""
    route = route_of("127.0.0.1")
    assert (route["GLOO_SOCKET_IFNAME"], route["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")
    assert route_of("192.0.2.1") == {}
