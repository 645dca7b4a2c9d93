"""Where ranks find each other: a file of one host, or an address of the first rank's."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fastserve.executor.collectives import open_store
from fastserve.wire.links import free_port


def test_a_store_listens_on_the_address_that_was_named() -> None:
    """All ranks read what one has written, and no other address of the host leads there."""
    port = free_port("127.0.0.1")
    stores = [open_store(f"tcp://127.0.0.1:{port}", rank, 2) for rank in range(2)]
    stores[1].set("key", "value")
    assert stores[0].get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 5)


def test_a_file_serves_the_ranks_of_one_host(tmp_path: Path) -> None:
    """Where all ranks are children of one process, nothing listens."""
    url = (tmp_path / "rendezvous").as_uri()
    stores = [open_store(url, rank, 2) for rank in range(2)]
    stores[1].set("key", "value")
    assert stores[0].get("key") == b"value"
