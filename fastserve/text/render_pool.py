"""Renders chat templates in processes that can be killed, so that none holds the server up.

Rules: a process has one conversation at a time; there are a few at most, the second begins when
the first is busy. One that dies over a conversation is replaced, and the conversation refused: it
has no prompt. One whose caller has left is killed. Must not know: HTTP, ids, what a template does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.text.chat_template import ChatTemplateError
from fastserve.text.render_messages import (
    Conversation,
    Refused,
    Template,
    decode_answer,
)
from fastserve.wire.child import reap, spawn
from fastserve.wire.frames import encode_frame, receive_frame

logger = logging.getLogger(__name__)

MAX_PROCESSES = 2
START_LIMIT_S = 60.0  # of a process
CPU_LIMIT_S = 1.0  # of one conversation
WALL_LIMIT_S = 30.0  # of a process that does not get a processor, or stands still
TOO_LONG = "The chat template takes more than {:g} s for these messages."


class RenderPool:
    """One template in up to MAX_PROCESSES processes; used on one event loop.

    `command` starts a process (render_process.py) with no more than this environment: the template
    may learn what is in it. The number of a socket is appended to the command.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        cpu_limit_s: float = CPU_LIMIT_S,
        wall_limit_s: float = WALL_LIMIT_S,
    ) -> None:
        self._template = encode_frame(Template(source, special_tokens, cpu_limit_s))
        self._cpu_limit_s = cpu_limit_s
        self._command = command
        self._environment = environment
        self._wall_limit_s = wall_limit_s
        self._idle: list[_Process] = []
        self._places = asyncio.Semaphore(MAX_PROCESSES)
        self._reaping: set[asyncio.Task[int]] = set()

    async def start(self) -> None:
        """Begin the first process, so that no conversation waits for it."""
        self._idle.append(await self._open())

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Return the prompt of a conversation; ChatTemplateError, in one line, where none is."""
        order = Conversation(
            json.dumps(messages),
            json.dumps(variables),
            add_generation_prompt,
            continue_final_message,
        )
        async with self._places:
            process = self._living() or await self._open()
            try:
                await process.begin()
                async with asyncio.timeout(self._wall_limit_s):
                    payload = await process.ask(encode_frame(order))
            except TimeoutError as error:
                self._end(process)
                raise ChatTemplateError(TOO_LONG.format(self._wall_limit_s)) from error
            except BaseException:
                self._end(process)
                raise
            if payload is None:
                raise ChatTemplateError(await self._why(process))
            self._idle.append(process)
        answer = decode_answer(payload)
        if isinstance(answer, Refused):
            raise ChatTemplateError(answer.message)
        return answer.text

    async def close(self) -> None:
        """End all processes; what they were at is given up before."""
        while self._idle:
            self._end(self._idle.pop())
        await asyncio.gather(*self._reaping)

    def _living(self) -> _Process | None:
        """Return a process that waits for work; one that was killed meanwhile is no use."""
        while self._idle:
            process = self._idle.pop()
            if process.popen.poll() is None:
                return process
            process.writer.close()
        return None

    async def _open(self) -> _Process:
        popen, connection = spawn(self._command, self._environment)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        writer.write(self._template)
        return _Process(popen, reader, writer)

    def _end(self, process: _Process) -> None:
        process.kill()
        task = asyncio.create_task(asyncio.to_thread(process.popen.wait))
        self._reaping.add(task)
        task.add_done_callback(self._reaping.discard)

    async def _why(self, process: _Process) -> str:
        process.writer.close()
        status = await asyncio.to_thread(reap, process.popen)
        if status == -signal.SIGPROF:
            return TOO_LONG.format(self._cpu_limit_s)
        logger.warning("a process that renders chat templates ended with status %d", status)
        return "The chat template cannot be rendered for these messages."


class _Process:
    """A process that renders, and the stream to it."""

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.popen = popen
        self.writer = writer
        self._reader = reader
        self._has_begun = False

    async def begin(self) -> None:
        """Wait until it is ready for conversations, which none of them is to blame for."""
        if not self._has_begun:
            async with asyncio.timeout(START_LIMIT_S):
                await receive_frame(self._reader)
            self._has_begun = True

    async def ask(self, frame: bytes) -> bytes | None:
        """Send one conversation and return the answer; None where the process died over it."""
        self.writer.write(frame)
        return await receive_frame(self._reader)

    def kill(self) -> None:
        """End it at once."""
        self.popen.kill()
        self.writer.close()
