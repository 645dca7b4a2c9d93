"""Serves one generation request: validate → prompts → engine → response or SSE.

Rules: nothing is submitted before everything was judged; a failure after the headers is one error
event, then [DONE]. Must not know: what bodies look like inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastserve.server.admission import cache_salt, check_fields, sampling_params
from fastserve.server.answers import Shape, Tally, joined
from fastserve.server.chat import ChatShape
from fastserve.server.completion import CompletionShape
from fastserve.server.context import ServerContext
from fastserve.server.deadlines import Deadline, deadline_of
from fastserve.server.disconnect import unless_gone
from fastserve.server.errors import ApiError, from_failure
from fastserve.server.event_stream import EventStream, error_events
from fastserve.server.gate import request_id_of, tenant_of
from fastserve.server.generation import (
    Choice,
    News,
    abort_all,
    news_of,
    submit,
)
from fastserve.server.logprobs import TokenNames
from fastserve.server.prompts import Prompt, chat_prompt, completion_prompts, least_size
from fastserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from fastserve.server.responses import DONE, sse
from fastserve.text.tokenizer import TextDelta

logger = logging.getLogger(__name__)

MIN_PIECE_BYTES = 2**16
MANY_CHOICES = 64


async def complete(body: CompletionRequest, context: ServerContext, request: Request) -> Response:
    """Answer POST /v1/completions."""
    context.check_model(body.model)
    context.check_priority(body.priority)
    info = context.require_engine()
    deadline = deadline_of(request, context.server_config.request_timeout)
    num_prompts, num_known_tokens = least_size(body)
    check_fields(body, num_prompts, num_known_tokens, info, context.max_price(info))
    context.require_place(num_prompts * (body.n or 1))
    if body.echo:
        context.require_tokenizer("echo")
    made = completion_prompts(body, context, info)
    prompts = await unless_gone(request.receive, deadline.wait(made))
    choices, tally = await start(body, prompts, context, request.scope, "cmpl")
    shape = CompletionShape(body, tally, context.tokenizer)
    return await respond(body, choices, shape, deadline, context, request)


async def chat(body: ChatCompletionRequest, context: ServerContext, request: Request) -> Response:
    """Answer POST /v1/chat/completions."""
    context.check_model(body.model)
    context.check_priority(body.priority)
    info = context.require_engine()
    deadline = deadline_of(request, context.server_config.request_timeout)
    check_fields(body, 1, 1, info, context.max_price(info))
    context.require_place(body.n or 1)
    made = chat_prompt(
        body.messages,
        context,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        variables=body.chat_template_kwargs,
        info=info,
    )
    prompt = await unless_gone(request.receive, deadline.wait(made))
    choices, tally = await start(body, [prompt], context, request.scope, "chatcmpl")
    return await respond(body, choices, ChatShape(body, tally), deadline, context, request)


async def start(
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    context: ServerContext,
    scope: Scope,
    prefix: str,
) -> tuple[list[Choice], Tally]:
    """Make the parameters, and hand every choice to the engine; `prefix` begins the answer's id."""
    info = context.require_engine()  # it may have died while the prompt was read
    params = sampling_params(
        body,
        prompts,
        info,
        has_tokenizer=context.tokenizer is not None,
        price=context.max_price(info),
    )
    choices = await submit(
        context,
        info,
        prompts,
        params,
        n=body.n or 1,
        priority=body.priority or 0,
        client=body.user or "",
        cache_salt=cache_salt(body, tenant_of(scope)),
        tenant=tenant_of(scope),
    )
    for _ in prompts:
        context.engine.metrics.asked(body.n or 1)
    names = TokenNames(context.tokenizer, bool(body.return_tokens_as_token_ids))
    tally = Tally(
        body,
        prompts,
        choices,
        answer_id=f"{prefix}-{request_id_of(scope)}",
        model=context.model_name,
        names=names,
    )
    return choices, tally


async def respond(
    body: GenerationRequest,
    choices: Sequence[Choice],
    shape: Shape,
    deadline: Deadline,
    context: ServerContext,
    request: Request,
) -> Response:
    """Return a stream, or the whole answer once there is one."""
    if body.stream:
        told, abort = events(choices, shape, deadline), partial(abort_all, choices)
        if context.resumable is not None:
            return context.resumable.begin(request, told, abort)
        return EventStream(told, abort)
    try:
        pieces = await unless_gone(request.receive, whole_answer(choices, shape, deadline))
    finally:
        abort_all(choices)
    return WholeAnswer(pieces)


async def whole_answer(choices: Sequence[Choice], shape: Shape, deadline: Deadline) -> list[bytes]:
    """Return the body of a response that is not streamed, in pieces."""
    deltas: list[list[TextDelta]] = [[] for _ in choices]
    try:
        async with contextlib.aclosing(news_of(choices, deadline)) as all_news:
            async for choice, delta in all_news:
                deltas[choice.index].append(delta)
    except Exception as error:
        failure = from_failure(error)
        if failure is None:
            raise
        raise failure from error

    def body() -> list[bytes]:
        return shape.whole([News(one, joined(deltas[one.index])) for one in choices]).pieces()

    if shape.tally.has_scores or len(choices) > MANY_CHOICES:  # which make it long
        return await asyncio.to_thread(body)
    return body()


async def events(
    choices: Sequence[Choice], shape: Shape, deadline: Deadline
) -> AsyncGenerator[Sequence[bytes]]:
    """Yield the events of a stream: those of one update together."""
    try:
        async with contextlib.aclosing(news_of(choices, deadline)) as all_news:
            async for news in all_news:
                if news.choice.shows_scores:
                    piece = await asyncio.to_thread(encoded, shape, news)
                else:
                    piece = encoded(shape, news)
                if piece:
                    yield piece
        usage = shape.tally.usage_chunk(shape.kind)
        yield (DONE,) if usage is None else (sse(usage), DONE)
    except Exception as error:
        failure = from_failure(error)
        if failure is None:
            logger.exception("a stream failed")
            failure = ApiError(500, "The server failed.", code="internal_error")
        yield error_events(failure)


def encoded(shape: Shape, news: News) -> Sequence[bytes]:
    """Return the events for some news; none where there is nothing to send."""
    return tuple(map(sse, shape.chunks(news)))


class WholeAnswer(Response):
    """Sends a body in pieces: as fast as the client takes them, where they are long."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes]) -> None:
        super().__init__(headers={"Content-Length": str(sum(map(len, pieces)))})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the response."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for piece in at_least(MIN_PIECE_BYTES, self._pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def at_least(num_bytes: int, pieces: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in pieces that are not shorter, but for the last one."""
    gathered: list[bytes] = []
    size = 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece)
        if size >= num_bytes:
            yield b"".join(gathered)
            gathered, size = [], 0
    yield b"".join(gathered)
