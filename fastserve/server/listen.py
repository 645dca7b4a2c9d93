"""Runs the HTTP server: binds, answers signals, drains, and ends when the engine cannot load.

Rules: the address is bound before anything is loaded, so that a port in use is known at once. After
the first SIGTERM or SIGINT new work is refused and answers under way end, for a bounded time; the
second ends at once. Must not know: routes, the engine's inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import uvicorn
from fastapi import FastAPI

from fastserve.client.async_engine import AsyncEngine
from fastserve.client.interfaces import EngineDeadError
from fastserve.host.open_files import raise_open_files_limit
from fastserve.server.connection import BoundedConnection, ConnectionLimits
from fastserve.settings.option import ConfigError
from fastserve.settings.server import ServerConfig

logger = logging.getLogger(__name__)

DRAIN_S = 30  # how long a stopping server waits for answers under way
LAST_BYTES_S = 5  # and then for their clients to take the rest
MAX_CONNECTIONS = 16_384  # where the limit on open files allows as many


class SignalledServer(uvicorn.Server):
    """A uvicorn server that drains on a signal and then returns normally.

    `ended_by` is the number of the second signal, which did not let it drain.
    """

    def __init__(
        self, config: uvicorn.Config, engine: AsyncEngine, refuse_work: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._refuse_work = refuse_work
        self.ended_by: int | None = None
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
        if self._draining is not None:
            logger.warning("%s again: ending at once, %d requests unfinished", name, count)
            self.ended_by = number
            self.should_exit = self.force_exit = True
            self._engine.kill()
            return
        under_way = f"finishing {count} requests, at most {DRAIN_S} s" if count else "stopping"
        logger.warning("%s: %s; a second signal ends at once", name, under_way)
        self._refuse_work()
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._engine.idle(), DRAIN_S)
        self.should_exit = True


def is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether a record tells of anything but a request that the end of the server cut off."""
    return record.exc_info is None or record.exc_info[0] is not asyncio.CancelledError


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket; ConfigError if there can be none."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
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
        sys.stderr.write(
            f"warning: {config.host} can be reached from other machines and no --api-key is set; "
            "anyone who reaches it can use the model\n"
        )


def run(
    app: FastAPI,
    engine: AsyncEngine,
    listener: socket.socket,
    refuse_work: Callable[[], None],
    server_config: ServerConfig,
) -> int:
    """Serve until a signal, upon which `refuse_work` is called; return the exit status.

    That is 0 after a signal, and 128 and its number after a second one.
    Raises ConfigError when the engine cannot honour its settings.
    """
    # Its startup lines tell of processes, not of the model; its warnings are wanted.
    uvicorn_logger = logging.getLogger("uvicorn.error")
    uvicorn_logger.setLevel(logging.WARNING)
    uvicorn_logger.addFilter(is_no_cancellation)
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
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_serve(SignalledServer(config, engine, refuse_work), engine, listener))


async def _serve(server: SignalledServer, engine: AsyncEngine, listener: socket.socket) -> int:
    await engine.start()
    watcher = asyncio.create_task(_watch_loading(server, engine, listener))
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
        has_loaded = engine.info is not None
        error = engine.error
        await engine.close()
    if error is not None and engine.is_misconfigured:
        raise ConfigError(error)
    if error is not None and not has_loaded:
        sys.stderr.write(f"fastserve: error: {error}\n")
        return 1
    return 0 if server.ended_by is None else 128 + server.ended_by


async def _watch_loading(
    server: uvicorn.Server, engine: AsyncEngine, listener: socket.socket
) -> None:
    try:
        info = await engine.ready()
    except EngineDeadError:
        server.should_exit = True  # it would never serve anything
        return
    host, port = address(listener)
    name = f"[{host}]" if ":" in host else host
    sys.stderr.write(f"Serving {info.model} on http://{name}:{port} (Ctrl-C stops)\n")
    sys.stderr.flush()
