"""TCP between hosts: addresses that may be listened on, links that notice a lost host, exchanges.

Rules: a wildcard address is refused, for what listens on all addresses can be reached from networks
that nobody thought of. A link sends at once what it is given, and ends within LINK_TIMEOUT_S when
the other host is gone or a cable is cut, whether there is something to send or not.
Must not know: what is said, who may say it.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

from fastserve.settings.option import ConfigError

LINK_TIMEOUT_S = 4
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface
IPV6_ADDRESSES = Path("/proc/net/if_inet6")
LOOPBACK = "lo"

T = TypeVar("T")
Exchange = Generator[bytes | int, bytes, T]
"""One end of a conversation: yields what to send, or how many bytes it needs next."""


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Return the family and the address of a host.

    Raises ConfigError for a name that has none and for a wildcard.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--master-addr {host}: {error.strerror}") from error
    numeric = str(address[0])
    if not host or ipaddress.ip_address(numeric.partition("%")[0]).is_unspecified:
        raise ConfigError(
            f"--master-addr {host}: that is every address of a host; name the one that the other "
            "hosts reach"
        )
    return family, numeric


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on one address; port 0 picks a free one.

    Raises ConfigError for a wildcard, and where the address is not this host's or is in use.
    """
    family, address = resolve(host, port)
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listening


def free_port(host: str) -> int:
    """Return a port of an address of this host that nobody listens on."""
    with listen(host, 0) as listening:
        port: int = listening.getsockname()[1]
        return port


def prepare(connection: socket.socket) -> None:
    """Let a connection send at once, and end soon after the other host has gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, LINK_TIMEOUT_S - 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        # Of what was sent and not acknowledged; keepalive asks only while there is nothing.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LINK_TIMEOUT_S * 1000)


def converse(connection: socket.socket, exchange: Exchange[T], deadline: float) -> T:
    """Carry on a conversation until it has led to something, and return that.

    `deadline` is a time of `time.monotonic`. Raises what the exchange raises, TimeoutError when
    the other end is silent for too long, OSError when it is gone. The connection blocks again
    afterwards.
    """
    try:
        step = next(exchange)
        while True:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            if isinstance(step, bytes):
                connection.sendall(step)
                step = next(exchange)
            else:
                step = exchange.send(_receive(connection, step, deadline))
    except StopIteration as end:
        result: T = end.value
        return result
    except TimeoutError:
        raise TimeoutError("it fell silent") from None
    finally:
        connection.settimeout(None)


def has_ended(connection: socket.socket) -> bool:
    """Whether the other end is gone, of a connection on which it has nothing to say."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def address_towards(host: str) -> str:
    """Return the address of this host from which another is reached; nothing is sent.

    Raises ConfigError where there is no route to it.
    """
    family, address = resolve(host, 1)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 1))
        except OSError as error:
            raise ConfigError(f"--master-addr {host}: {error.strerror}") from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an address; None where none is found."""
    numeric = address.partition("%")[0]
    if ipaddress.ip_address(numeric).is_loopback:
        return LOOPBACK
    if ":" in numeric:
        return _interface_of_ipv6(numeric)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(reply[20:24]) == numeric:
                return name
    return None


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < size:
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("it closed the connection")
        received += part
    return bytes(received)


def _interface_of_ipv6(address: str) -> str | None:
    packed = socket.inet_pton(socket.AF_INET6, address).hex()
    try:
        lines = IPV6_ADDRESSES.read_text(encoding="ascii").splitlines()
    except OSError:  # another system, or none of that family
        return None
    return next((line.split()[-1] for line in lines if line.startswith(packed)), None)
