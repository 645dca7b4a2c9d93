"""DriverLink: a rank's end of the connection with what drives it.

Rules: one thread reads orders, so that what must not wait for a step in progress is seen at once;
another says each second that the process is there, from before anything heavy is loaded. The end of
the connection ends the process, whatever it is at: nobody is left to report to. A rank without
orders sleeps on its socket. Must not know: torch, how an order is carried out.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable

from fastserve.host.log import end_process
from fastserve.wire.frames import encode_frame, read_frame
from fastserve.wire.rank_messages import (
    BEAT_S,
    NOT_STARTED,
    Beat,
    Leave,
    Order,
    Report,
    decode_order,
)

LEFT = 0
"""The exit status of a rank that was told to leave."""
LOST = 1
"""That of one whose driver is gone, which may be followed by another."""

logger = logging.getLogger(__name__)


class DriverLink:
    """Orders in, reports out; `step_id` is what heartbeats say the rank is at."""

    def __init__(self, connection: socket.socket) -> None:
        self.step_id = NOT_STARTED
        self.on_arrival: Callable[[Order], None] = lambda order: None
        self._connection = connection
        self._stream = connection.makefile("rb")
        self._sending = threading.Lock()
        self._orders: queue.SimpleQueue[Order | Exception] = queue.SimpleQueue()
        self._is_over = threading.Event()
        for target in (self._read, self._beat):
            threading.Thread(target=target, name=f"rank{target.__name__}", daemon=True).start()

    def get(self) -> Order:
        """Wait for the next order; raises what `on_arrival` raised at one."""
        order = self._orders.get()
        if isinstance(order, Exception):
            raise order
        return order

    def report(self, report: Report) -> None:
        """Send a report; callable from any thread."""
        frame = encode_frame(report)
        try:
            with self._sending:
                self._connection.sendall(frame)
        except OSError as error:  # the reader sees the same end, and ends the process
            logger.debug("the driver is gone: %s", error)
            self._is_over.set()

    def _read(self) -> None:
        status = LOST
        try:
            while (payload := read_frame(self._stream)) is not None:
                order = decode_order(payload)
                if isinstance(order, Leave):
                    status = LEFT
                    return
                try:
                    self.on_arrival(order)
                except Exception as error:
                    self._orders.put(error)
                self._orders.put(order)
        except OSError as error:  # a host or a cable between two
            logger.warning("the connection to the driver broke: %s", error)
        except ValueError:
            logger.exception("the driver cannot be understood")
        finally:
            end_process(status)

    def _beat(self) -> None:
        self.report(Beat(self.step_id))
        while not self._is_over.wait(BEAT_S):
            self.report(Beat(self.step_id))
