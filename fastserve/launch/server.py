"""Serves over HTTP, with engines in processes of their own, until a signal.

Must not know: what a request asks for, what an engine does.
"""

from __future__ import annotations

import dataclasses
import os
import sys

from fastserve.checkpoint import locate as checkpoint
from fastserve.client.async_engine import AsyncEngine
from fastserve.host.log import open_log
from fastserve.launch.children import ENGINE_FD, RANK_FD, command, environment, replica_environment
from fastserve.launch.tokenizer import open_rendering, open_tokenizer
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ENGINE_TIMEOUT_S, ServerConfig


def serve(config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve over HTTP until a signal; return the exit status.

    A host other than the first only runs its ranks.
    """
    if config.node_rank > 0:
        return run_host(config, server_config.log_level)
    from fastserve.server import listen
    from fastserve.server.app import create_app
    from fastserve.server.key_sources import read_keys

    open_log(server_config.log_level.upper())
    server_config = dataclasses.replace(server_config, api_key=read_keys(server_config, os.environ))
    tokenizer = open_tokenizer(config, server_config.chat_template)
    with listen.bind(server_config.host, server_config.port) as listener:
        listen.warn_if_exposed(listener, server_config)
        names = (*server_config.served_model_name, checkpoint.public_name(config.model))
        engine = open_async_engine(config, names[0], server_config.engine_timeout)
        rendering = open_rendering(tokenizer)
        app = create_app(engine, tokenizer, rendering, config, server_config)

        def refuse_work() -> None:
            app.state.context.is_draining = True

        return listen.run(app, engine, listener, refuse_work, server_config, rendering)


def open_async_engine(
    config: EngineConfig,
    model_name: str | None = None,
    engine_timeout_s: float = ENGINE_TIMEOUT_S,
) -> AsyncEngine:
    """Return an engine that will run in processes of its own; `start` begins to load it."""
    return AsyncEngine(
        config,
        command(ENGINE_FD),
        environment=environment(),
        replica_environments=[
            replica_environment(config, replica) for replica in range(config.data_parallel_size)
        ],
        model_name=model_name,
        engine_timeout_s=engine_timeout_s,
    )


def run_host(config: EngineConfig, log_level: str) -> int:
    """Run the ranks of a host that does not serve; return the exit status."""
    from fastserve.executor.host_ranks import open_host_ranks
    from fastserve.wire.joining import JoinError

    open_log(log_level.upper())
    model_dir = checkpoint.locate(config.model, config.revision)
    host, ranks = open_host_ranks(config, model_dir, command(RANK_FD), environment())
    try:
        return host.serve(ranks)
    except JoinError as error:
        sys.stderr.write(f"fastserve: error: {error}\n")
        return 1
