"""Runs the HTTP server: listens, answers signals, drains, and ends when the engine is gone.

Rules: the address is listened at before anything is loaded, so that a port in use is known at once.
After the first SIGTERM or SIGINT new work is refused and answers under way end, for a bounded time,
after which each is told that it is cut off; then the address is given up, and who was let in before
is answered. A second signal ends at once. An engine that is gone for good ends the server. The exit
status tells these apart.
Must not know: routes, the engine's inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import uvicorn
from fastapi import FastAPI

from fastserve.client.async_engine import AsyncEngine
from fastserve.client.interfaces import EngineDeadError
from fastserve.host.garbage_collector import leave_startup_alone
from fastserve.host.log import once_in_a_while
from fastserve.host.open_files import raise_open_files_limit
from fastserve.host.streams import write_stderr
from fastserve.server.connection import BoundedConnection, ConnectionLimits
from fastserve.server.last_clients import take_in_last
from fastserve.settings.option import ConfigError
from fastserve.settings.server import ServerConfig
from fastserve.text.render_pool import RenderPool

logger = logging.getLogger(__name__)

LAST_BYTES_S = 3  # that the clients of a server that ends have to take what it has said
BACKLOG = 2048  # connections that wait to be accepted; uvicorn's own
MAX_CONNECTIONS = 16_384  # where the limit on open files allows as many


class SignalledServer(uvicorn.Server):
    """A uvicorn server that drains on a signal and then returns normally.

    `exit_status` is 0 where all that was accepted was answered whole, and 128 and the number of the
    latest signal where something was cut off.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        refuse_work: Callable[[], None],
        shutdown_timeout_s: float,
    ) -> None:
        super().__init__(config)
        self.exit_status = 0
        self._engine = engine
        self._refuse_work = refuse_work
        self._shutdown_timeout_s = shutdown_timeout_s
        self._signal = 0  # the number of the latest one
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT while serving."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._answer, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _answer(self, number: int) -> None:
        name, count = signal.Signals(number).name, self._engine.num_requests
        self._signal = number
        if self._draining is not None:
            logger.warning("%s again: ending at once, %d requests unfinished", name, count)
            self._cut_off()
            self.should_exit = self.force_exit = True
            self._engine.kill()
            return
        limit_s = self._shutdown_timeout_s
        under_way = f"finishing {count} requests, at most {limit_s:g} s" if count else "stopping"
        logger.warning("%s: %s; a second signal ends at once", name, under_way)
        self._refuse_work()
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await asyncio.wait_for(self._engine.idle(), self._shutdown_timeout_s)
        except TimeoutError:
            logger.warning("time is up: %d requests are cut off", self._engine.num_requests)
            self._cut_off()
            self._engine.end_requests()
        self.should_exit = True

    def _cut_off(self) -> None:
        self.exit_status = 128 + self._signal

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let nobody else in, and close every connection once its client has been answered.

        That takes a bounded time.
        """
        if not self.force_exit:
            for listener in sockets or ():
                await take_in_last(listener)
        await super().shutdown(sockets)
        if self.server_state.tasks and self._signal:  # of clients that take nothing
            self._cut_off()


def is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether a record tells of anything but a request that the end of the server cut off."""
    return record.exc_info is None or record.exc_info[0] is not asyncio.CancelledError


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; ConfigError if there can be none.

    Two sockets may be bound to one port as long as neither listens.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def num_connections(num_open_files: int) -> int:
    """Return how many connections there may be; some files are left to engines and logs."""
    return min(MAX_CONNECTIONS, num_open_files - min(256, num_open_files // 4))


def address(listener: socket.socket) -> tuple[str, int]:
    """Return the host and the port of a bound socket."""
    host, port = listener.getsockname()[:2]
    return host, port


def warn_if_exposed(listener: socket.socket, config: ServerConfig) -> None:
    """Warn on stderr when others can reach the server and it asks for no key."""
    host, _ = address(listener)
    if not config.api_key and not ipaddress.ip_address(host).is_loopback:
        write_stderr(
            f"warning: {config.host} can be reached from other machines and no --api-key is set; "
            "anyone who reaches it can use the model"
        )


def run(
    app: FastAPI,
    engine: AsyncEngine,
    listener: socket.socket,
    refuse_work: Callable[[], None],
    server_config: ServerConfig,
    rendering: RenderPool | None,
) -> int:
    """Serve until a signal, upon which `refuse_work` is called; return the exit status.

    That is 0 after a signal where all that was accepted was answered whole, 128 and the signal's
    number where something was cut off, and 1 once the engine is gone for good.
    Raises ConfigError when the engine cannot honour its settings.
    """
    # Its startup lines tell of processes, not of the model; its warnings are of what clients send.
    uvicorn_logger = logging.getLogger("uvicorn.error")
    uvicorn_logger.setLevel(logging.WARNING)
    uvicorn_logger.addFilter(is_no_cancellation)
    uvicorn_logger.addFilter(once_in_a_while())
    limits = ConnectionLimits(num_connections(raise_open_files_limit()))
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], partial(BoundedConnection, limits=limits)),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",  # the app has none, and its task would be one more to cut off
        timeout_keep_alive=server_config.timeout_keep_alive,
        timeout_graceful_shutdown=LAST_BYTES_S,
    )
    server = SignalledServer(config, engine, refuse_work, server_config.shutdown_timeout)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_serve(server, engine, listener, rendering))


async def _serve(
    server: SignalledServer,
    engine: AsyncEngine,
    listener: socket.socket,
    rendering: RenderPool | None,
) -> int:
    await engine.start()
    if rendering is not None:
        await rendering.start()
    watchers = [
        asyncio.create_task(_announce(engine, listener)),
        asyncio.create_task(_end_with(engine, server)),
    ]
    leave_startup_alone()
    try:
        await server.serve(sockets=[listener])
    finally:
        for watcher in watchers:
            watcher.cancel()
        error = engine.error
        await engine.close()
        if rendering is not None:
            await rendering.close()
    if error is None:
        return server.exit_status
    if engine.is_misconfigured:
        raise ConfigError(error)
    write_stderr(f"fastserve: error: {error}")
    return 1


async def _announce(engine: AsyncEngine, listener: socket.socket) -> None:
    """Say where the model is served, once it is."""
    try:
        info = await engine.ready()
    except EngineDeadError:
        return
    host, port = address(listener)
    name = f"[{host}]" if ":" in host else host
    write_stderr(f"Serving {info.model} on http://{name}:{port} (Ctrl-C stops)")


async def _end_with(engine: AsyncEngine, server: uvicorn.Server) -> None:
    """Let the server end once no replica of its engine will ever run again.

    Every stream has been told by then; what supervises this process can start another.
    """
    await engine.over()
    server.should_exit = True
