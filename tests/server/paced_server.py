"""A server over the engine process of the tests: the real HTTP side before a checked fake device.

    python -m tests.server.paced_server MODEL [FLAGS]

The model's name chooses a fault (tests/engine/engine_process.py). There is no tokenizer: prompts
are ids. `serving` runs one; `Answers` opens requests of one and says how each ended.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from fastserve.client.async_engine import AsyncEngine
from fastserve.host.log import open_log
from fastserve.server import listen
from fastserve.server.app import create_app
from fastserve.settings.command_line import Settings, add_arguments
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ServerConfig
from fastserve.verbs.parser import Parser

COMMAND = (sys.executable, "-m", "tests.engine.engine_process", "--engine-fd")


class Paced:
    """A server that serves, and what it has said until now."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = self.wait_for(r"Serving \S+ on (http://\S+)")[1]

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read its log until a line matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"the server ended without a line like {pattern}")


@contextmanager
def serving(model: str, *flags: str) -> Iterator[Paced]:
    """Run one on a free port; killed in the end if it still runs."""
    process = subprocess.Popen(
        (sys.executable, "-m", "tests.server.paced_server", model, "--port", "0", *flags),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Paced(process)
    finally:
        process.kill()
        process.communicate()


class Answers:
    """Requests of one server, and how each has ended."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.num_events = 0
        self.num_accepted = 0  # of which the head of an answer has come
        self.has_news = asyncio.Event()
        self._client = client
        self._tasks: list[asyncio.Task[str]] = []

    def open(self, count: int, **body: Any) -> None:
        """Begin so many requests."""
        for seed in range(count):
            one = {"prompt": [1, 2, 3], "seed": seed, "return_token_ids": True, **body}
            self._tasks.append(asyncio.create_task(self._answer(one)))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what news will bring about."""
        while not condition():
            self.has_news.clear()
            await self.has_news.wait()

    async def ends(self) -> Counter[str]:
        """Wait for the end of all, and count how they ended."""
        return Counter(await asyncio.gather(*self._tasks))

    async def _answer(self, body: dict[str, Any]) -> str:
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            self.num_accepted += 1
            self.has_news.set()
            if response.status_code != 200:
                error = json.loads(await response.aread())["error"]
                return f"{response.status_code} {error['code']}"
            if not body.get("stream"):
                await response.aread()
                return "whole"
            events = []
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                    self.num_events += 1
                    self.has_news.set()
        return how_it_ended(events)


def how_it_ended(events: list[str]) -> str:
    """Return what the events of a stream come to: one end, then [DONE], and nothing behind it."""
    *pieces, last, done = events
    assert done == "[DONE]"
    assert not [piece for piece in pieces if "error" in json.loads(piece)]
    end = json.loads(last)
    if "error" in end:
        return f"error {end['error']['code']}"
    assert end["choices"][0]["finish_reason"] == "length"
    return "whole"


def main() -> int:
    """Be a server."""
    parser = Parser(prog="paced_server")
    for owner in (EngineConfig, ServerConfig):
        add_arguments(parser, owner)
    parser.set_defaults(owners=(EngineConfig, ServerConfig), config=None)
    settings = Settings(parser.parse_args())
    config, server_config = settings.build(EngineConfig), settings.build(ServerConfig)
    open_log("INFO")
    with listen.bind(server_config.host, server_config.port) as listener:
        engine = AsyncEngine(config, COMMAND, engine_timeout_s=server_config.engine_timeout)
        app = create_app(engine, None, None, config, server_config)

        def refuse_work() -> None:
            app.state.context.is_draining = True

        return listen.run(app, engine, listener, refuse_work, server_config, None)


if __name__ == "__main__":
    sys.exit(main())
