"""An engine that says what a test tells it to: for failures and orders a real one seldom shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp

from fastserve.client.metrics import EngineMetrics
from fastserve.client.replica_metrics import ReplicaMetrics
from fastserve.core.messages import RequestMetrics, RequestUpdate, Sample, TokenLogprobs
from fastserve.core.request import Arrival, FinishReason, Handle
from fastserve.server.app import create_app
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ServerConfig
from fastserve.text.tokenizer import Tokenizer
from fastserve.wire.engine_messages import EngineInfo
from tests import tiny_tokenizers
from tests.core.harness import UNIT_COST

EOS = 1
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZER = Tokenizer(tiny_tokenizers.byte_level(), NAMED, tiny_tokenizers.CHAT_TEMPLATE)
METRICS = RequestMetrics(
    arrival=1.0, first_scheduled=2.0, first_token=3.0, finished=4.0, queue_s=1.0,
    num_preemptions=0, num_swaps=0, swap_s=0.0, recomputed_tokens=0, cached_tokens=1, level=0,
    predicted_output_tokens=None,
)  # fmt: skip

Item = RequestUpdate | Exception
Script = Callable[["ScriptedStream"], Sequence[Item]]


class ScriptedStream:
    """One request: yields its script, then waits until finished or aborted."""

    def __init__(self, arrival: Arrival, index: int) -> None:
        self.prompt_token_ids = list(arrival.prompt_token_ids)
        self.params = arrival.params.of_choice(index)
        self.priority = arrival.priority
        self.client = arrival.client
        self.cache_salt = arrival.cache_salt
        self.finished_at: int | None = None
        self.is_aborted = False
        self.is_ended = False
        self.items: asyncio.Queue[Item] = asyncio.Queue()
        self.aborted = asyncio.Event()

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> RequestUpdate:
        if self.is_ended:
            raise StopAsyncIteration
        item = await self.items.get()
        if isinstance(item, Exception):
            self.is_ended = True
            raise item
        self.is_ended = item.finish_reason is not None
        return item

    def finish(self, num_output_tokens: int) -> None:
        self.finished_at = num_output_tokens
        self.items.put_nowait(RequestUpdate(Handle(0), (), FinishReason.STOP, None, METRICS))

    def abort(self) -> None:
        if not self.is_ended:
            self.is_aborted = True
            self.aborted.set()


class ScriptedEngine:
    """Fits `EngineClient` by shape."""

    def __init__(self, script: Script | None = None, **info: Any) -> None:
        self.script = script or says("ok")
        facts: dict[str, Any] = {
            "model": "tiny", "max_model_len": 100, "max_request_tokens": 100,
            "vocab_size": TOKENIZER.vocab_size, "block_size": 4, "num_device_blocks": 25,
            "num_host_blocks": 0, "block_bytes": 1000,
            "eos_token_ids": frozenset({EOS}), "dtype": "float32", "device": "cpu",
            "cost_model": UNIT_COST, "max_num_seqs": 8, "enable_prefix_caching": True,
        }  # fmt: skip
        self.info: EngineInfo | None = EngineInfo(**{**facts, **info})
        self.is_ready = True
        self.is_dead = False
        self.error: str | None = None
        self.progress = ("loading weights", 0.5)
        self.metrics = ReplicaMetrics("tiny", [EngineMetrics("tiny")], lambda: 1)
        self.streams: list[ScriptedStream] = []
        self.num_submissions = 0
        self.num_requests = 0

    def submit_choices(self, arrival: Arrival, n: int) -> list[ScriptedStream]:
        self.num_submissions += 1
        streams = [ScriptedStream(arrival, index) for index in range(n)]
        for stream in streams:
            self.streams.append(stream)
            for item in self.script(stream):
                stream.items.put_nowait(item)
        return streams


def scored(stream: ScriptedStream, token_id: int) -> Sample:
    """Return a sample, with logprobs when they were asked for: the id itself, then ids 4, 5, …."""
    k = stream.params.logprobs
    if k is None:
        return Sample(token_id)
    return Sample(token_id, entry(token_id, k))


def entry(token_id: int, k: int) -> TokenLogprobs:
    """Return made-up scores."""
    ids = [token_id, *range(4, 30)][:k]
    return TokenLogprobs(-0.5, 1, ids, [-0.5 - i for i in range(k)])


def says(
    text: str, *, ends: FinishReason | None = FinishReason.STOP, per_update: int = 1
) -> Script:
    """Return a script that says a text; `ends` None leaves it open, STOP adds an EOS."""

    def script(stream: ScriptedStream) -> list[Item]:
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        if ends is FinishReason.STOP:
            ids.append(EOS)
        samples = [scored(stream, token_id) for token_id in ids]
        updates: list[Item] = [
            RequestUpdate(Handle(0), samples[i : i + per_update])
            for i in range(0, len(samples), per_update)
        ]
        k = stream.params.prompt_logprobs
        if k is not None:
            entries = [entry(token_id, k) for token_id in stream.prompt_token_ids[1:]]
            updates.insert(0, RequestUpdate(Handle(0), (), prompt_logprobs=entries))
        last = updates[-1]
        assert isinstance(last, RequestUpdate)
        if ends is not None:
            updates[-1] = last._replace(finish_reason=ends, metrics=METRICS)
        return updates

    return script


def fails(text: str, error: Exception) -> Script:
    """Return a script that says a text and then fails."""
    return lambda stream: [*says(text, ends=None)(stream), error]


class RenderingHere:
    """Fits `Rendering`: in this process, for templates that are no danger to it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._renderer = tokenizer.chat_renderer()

    async def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the prompt."""
        return self._renderer.render(messages, **options)


def make_app(
    engine: ScriptedEngine, *, tokenizer: Tokenizer | None = TOKENIZER, **server: Any
) -> FastAPI:
    """Return the app over a scripted engine."""
    config = EngineConfig(model="tiny")
    rendering = None
    if tokenizer is not None and tokenizer.chat_template is not None:
        rendering = RenderingHere(tokenizer)
    return create_app(engine, tokenizer, rendering, config, ServerConfig(**server))


def call(app: ASGIApp, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """Make one request of an app, without a network."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(run())


def post(engine: ScriptedEngine, path: str, body: Any, **server: Any) -> httpx.Response:
    """POST one JSON body to an app over `engine`."""
    return call(make_app(engine, **server), "POST", path, json=body)
