"""The two threads at the socket of an engine process."""

from __future__ import annotations

import socket
import threading

from fastserve.engine.boxes import Inbox, Outbox
from fastserve.wire.engine_messages import Abort, Finish, Progress, RequestNumber, decode_event
from fastserve.wire.frames import encode_frame, read_frame


def test_the_inbox_tells_of_each_command_and_of_the_end() -> None:
    """Commands come out in order; the end is told of, and seen only after the last command."""
    ours, theirs = socket.socketpair()
    arrivals = threading.Semaphore(0)
    with ours, theirs:
        inbox = Inbox(theirs)
        inbox.on_arrival = arrivals.release
        ours.sendall(encode_frame(Abort(RequestNumber(1))) + encode_frame(Abort(RequestNumber(2))))
        assert arrivals.acquire(timeout=10)
        assert arrivals.acquire(timeout=10)
        assert not inbox.has_ended
        ours.sendall(encode_frame(Finish(RequestNumber(3), 4)))
        ours.shutdown(socket.SHUT_WR)
        assert arrivals.acquire(timeout=10)
        assert arrivals.acquire(timeout=10)
        assert inbox.has_ended
        assert not inbox.is_closed
        assert inbox.drain() == [Abort(1), Abort(2), Finish(3, 4)]
        assert inbox.is_closed
        assert inbox.drain() == []


def test_the_outbox_never_waits_for_a_slow_reader() -> None:
    """Far more than a socket buffer is taken at once, and arrives whole when it is read."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outbox = Outbox(theirs)
        for number in range(200):
            outbox.send(Progress("x" * 100_000, number))
        with ours.makefile("rb") as stream:
            for number in range(200):
                payload = read_frame(stream)
                assert payload is not None
                event = decode_event(payload)
                assert isinstance(event, Progress)
                assert event.fraction == number
        outbox.close()
