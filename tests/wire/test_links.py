"""Links between hosts: what may be listened on, and how a lost one is noticed."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from fastserve.settings.option import ConfigError
from fastserve.wire import links
from fastserve.wire.links import (
    Exchange,
    address_towards,
    converse,
    free_port,
    has_ended,
    interface_of,
    listen,
    prepare,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0"])
def test_a_wildcard_is_refused(host: str) -> None:
    """Whatever its spelling, an address that means all is not listened on."""
    with pytest.raises(ConfigError, match="that is every address of a host; name the one"):
        listen(host, 0)


def test_an_address_of_another_host_and_one_in_use_are_refused() -> None:
    """The line names the address and says why."""
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1 port 0: Cannot assign"):
        listen("192.0.2.1", 0)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use"):
            listen("127.0.0.1", port)


def test_a_link_is_watched_from_both_sides() -> None:
    """A connection is asked every second, idle or not, and ends LINK_TIMEOUT_S after no answer.

    That it then does, over a cable that is cut, scripts/two_hosts shows.
    """
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()) as connection,
    ):
        prepare(connection)
        tcp = [
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (
                socket.TCP_NODELAY,
                socket.TCP_KEEPIDLE,
                socket.TCP_KEEPINTVL,
                socket.TCP_KEEPCNT,
                socket.TCP_USER_TIMEOUT,
            )
        ]
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    idle_s, interval_s, count = tcp[1:4]
    assert tcp == [1, 1, 1, 3, 4000]
    assert idle_s + interval_s * count <= links.LINK_TIMEOUT_S < 5


def echo() -> Exchange[bytes]:
    """Send two bytes, and lead to the three that come back."""
    yield b"hi"
    return (yield 3)


def test_a_conversation_takes_what_it_asked_for_and_no_more(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """What follows stays in the connection, which blocks again."""
    ours, theirs = pair
    theirs.sendall(b"abcdef")
    assert converse(ours, echo(), time.monotonic() + 5) == b"abc"
    assert theirs.recv(9) == b"hi"
    assert ours.gettimeout() is None
    assert ours.recv(9) == b"def"


def test_silence_and_the_end_of_a_connection_end_a_conversation(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Each with its own error, the first after the time that was given."""
    ours, theirs = pair
    theirs.sendall(b"ab")
    with pytest.raises(TimeoutError, match="it fell silent"):
        converse(ours, echo(), time.monotonic() + 0.05)
    assert not has_ended(ours)
    theirs.close()
    assert has_ended(ours)
    with pytest.raises((ConnectionError, BrokenPipeError)):
        converse(ours, echo(), time.monotonic() + 5)


def test_a_route_begins_at_an_address_of_an_interface() -> None:
    """All of 127/8 is reached over the loopback interface; what is this host's has an interface."""
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == interface_of("127.0.1.1") == interface_of("::1") == "lo"
    assert interface_of("192.0.2.1") is None  # an address that no host has
    with contextlib.suppress(ConfigError):  # a host without a way to any other
        ours = address_towards("192.0.2.1")
        assert interface_of(ours) in {name for _, name in socket.if_nameindex()}


def test_a_free_port_can_be_listened_on() -> None:
    """Nobody listens there, and it is not that of somebody who does."""
    with listen("127.0.0.1", 0) as taken, listen("127.0.0.1", free_port("127.0.0.1")) as ours:
        assert ours.getsockname() != taken.getsockname()
