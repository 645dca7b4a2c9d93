"""The end of a listening socket, at which no client that the kernel let in is turned away unheard.

Closing the socket resets every connection that waits to be accepted, whose client may have sent a
request by then. So the door is shut first: who knocks is not let in any more, and is refused once
the socket is closed, while handshakes under way still end and whoever waits is taken in.
Must not know: what becomes of a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import select
import socket
import struct
import sys
import time

HANDSHAKE_S = 0.1  # for the last packet of one that has begun
TAKE_IN_S = 1.0  # for those who wait, where the door cannot be shut or nobody can be taken in

SO_ATTACH_FILTER = 26  # Linux; the socket module does not name it
# A classic BPF program over a segment's TCP header: (code, jump if true, jump if false, operand).
FIRST_SYN_IS_DROPPED = (
    (0x30, 0, 0, 13),  # load the byte of flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone: a client knocks
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # take all else
)


async def take_in_last(listener: socket.socket) -> None:
    """Shut the door and return once whoever was let in before has been accepted."""
    shut_door(listener)
    await asyncio.sleep(HANDSHAKE_S)
    deadline = time.monotonic() + TAKE_IN_S
    while has_unread(listener.fileno()) and time.monotonic() < deadline:
        await asyncio.sleep(0)  # the loop accepts


def shut_door(listener: socket.socket) -> None:
    """Have the kernel drop what would begin a connection, where it is Linux's.

    A client tries again within a second or so, and is refused when the socket is closed by then.
    """
    if sys.platform != "linux":
        return
    program = b"".join(struct.pack("HBBI", *step) for step in FIRST_SYN_IS_DROPPED)
    held = ctypes.create_string_buffer(program)
    described = struct.pack("HP", len(FIRST_SYN_IS_DROPPED), ctypes.addressof(held))
    with contextlib.suppress(OSError):  # a sandbox may have no filters: the door stays open
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, described)


def has_unread(descriptor: int) -> bool:
    """Return whether a socket has something to read, or somebody to accept."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
