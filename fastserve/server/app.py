"""The routes, and what is wired around them.

Rules: a route reads its body, hands it to the function that answers, and does nothing else; what
it can answer stands in openapi.py. Must not know: sampling, text, how the engine is started.
"""

from __future__ import annotations

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import fastserve
from fastserve.checkpoint.locate import public_name
from fastserve.client.interfaces import EngineClient, ServerMetrics
from fastserve.server import protocol, serving, text_routes
from fastserve.server.context import Rendering, ServerContext
from fastserve.server.disconnect import ClientGoneError, answer_nobody, unless_gone
from fastserve.server.errors import answer_http_exception
from fastserve.server.gate import Gate
from fastserve.server.host_names import HostNames
from fastserve.server.openapi import describe
from fastserve.server.reading import read_body
from fastserve.server.replay import ReplayLimits
from fastserve.server.responses import ModelCard, ModelList, Ready, Version
from fastserve.server.resumption import LAST_EVENT_ID, ResumableStreams
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ServerConfig
from fastserve.text.tokenizer import Tokenizer

# What a page of an allowed origin may read of an answer, besides what every page may.
EXPOSED_HEADERS = ("X-Request-Id", "Retry-After")
ANY = ("*",)


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer | None,
    rendering: Rendering | None,
    config: EngineConfig,
    server_config: ServerConfig,
) -> FastAPI:
    """Return the HTTP app over an engine, which the caller starts and closes.

    `app.state.context.is_draining = True` refuses new work while what is under way ends.
    """
    resumable = resumable_streams(server_config, engine.metrics)
    context = ServerContext(engine, tokenizer, rendering, config, server_config, resumable)
    app = FastAPI(
        title="FastServe",
        version=fastserve.__version__,
        redirect_slashes=False,
        exception_handlers={
            HTTPException: answer_http_exception,
            ClientGoneError: answer_nobody,
        },
    )
    app.state.context = context
    add_generation_routes(app, context)
    add_model_routes(app, context)
    add_status_routes(app, context)
    app.add_middleware(
        Gate,
        host_names=HostNames(server_config.host, server_config.allowed_hosts),
        api_keys=server_config.api_key,
        max_body_bytes=server_config.max_body_bytes,
        logs_requests=not server_config.disable_log_requests,
    )
    if server_config.allowed_origins:
        # Outermost: it answers preflights, which carry no key, and marks refusals too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server_config.allowed_origins,
            allow_methods=server_config.allowed_methods or ANY,
            allow_headers=server_config.allowed_headers or ANY,
            allow_credentials=server_config.allow_credentials,
            expose_headers=(*EXPOSED_HEADERS, *((LAST_EVENT_ID,) if resumable is not None else ())),
        )
    has_keys = bool(server_config.api_key)
    app.openapi = lambda: describe(  # type: ignore[method-assign]
        app, has_keys=has_keys, resumes_streams=resumable is not None
    )
    return app


def resumable_streams(config: ServerConfig, metrics: ServerMetrics) -> ResumableStreams | None:
    """Return what keeps streams for clients that come back, where these have any time for it."""
    if not config.stream_grace:
        return None
    kept = ResumableStreams(ReplayLimits(config.stream_grace, config.max_replay_bytes))
    text = "Streams that a client may go on with: those that are read, and others for the grace."
    metrics.show("resumable_streams", text, lambda: len(kept))
    metrics.show("replay_bytes", "Memory for what these have said.", lambda: kept.num_bytes)
    return kept


def add_generation_routes(app: FastAPI, context: ServerContext) -> None:
    """Add the routes that read a body."""

    async def resumed(request: Request) -> Response | None:
        if context.resumable is None:
            return None
        return await context.resumable.resume(request, context.bodies)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        if (rest := await resumed(request)) is not None:
            return rest
        body = await read_body(request, protocol.CompletionRequest, context)
        return await serving.complete(body, context, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        if (rest := await resumed(request)) is not None:
            return rest
        body = await read_body(request, protocol.ChatCompletionRequest, context)
        return await serving.chat(body, context, request)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, protocol.TokenizeRequest, context)
        work = text_routes.tokenize(body, context)
        return json_response(await unless_gone(request.receive, work))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, protocol.DetokenizeRequest, context)
        work = text_routes.detokenize(body, context)
        return json_response(await unless_gone(request.receive, work))


def add_model_routes(app: FastAPI, context: ServerContext) -> None:
    """Add the routes that say which model this is."""

    def card(name: str) -> ModelCard:
        info = context.engine.info
        return ModelCard(
            id=name,
            created=context.created,
            root=public_name(context.config.model),
            max_model_len=None if info is None else info.max_model_len,
        )

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response(ModelList(data=[card(name) for name in context.model_names]))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        context.check_model(name)
        return json_response(card(name))


def add_status_routes(app: FastAPI, context: ServerContext) -> None:
    """Add the routes that say how the server is."""

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        context.require_life()
        return Response()

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> Response:
        context.require_engine()
        return json_response(Ready())

    @app.head("/version", include_in_schema=False)
    @app.get("/version")
    async def version() -> Response:
        return json_response(Version(fastserve.__version__))

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics() -> Response:
        content, media_type = context.engine.metrics.render()
        return Response(content, headers={"Content-Type": media_type})


def json_response(body: msgspec.Struct) -> Response:
    """Return a response with a JSON body."""
    return Response(msgspec.json.encode(body), media_type="application/json")
