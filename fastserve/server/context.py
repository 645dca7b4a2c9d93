"""What every route needs: the engine, the tokenizer, the settings, and whether to take work.

Rules: one per app, made by create_app; nothing here changes but `is_draining`.
Must not know: routes, bodies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastserve.checkpoint.locate import public_name
from fastserve.client.interfaces import EngineClient
from fastserve.server.bodies import NUM_LARGEST, Bodies
from fastserve.server.errors import ApiError, engine_dead, invalid, shutting_down, unavailable
from fastserve.server.refused_fields import UnreadFields
from fastserve.server.resumption import ResumableStreams
from fastserve.server.text_pool import TextPool
from fastserve.server.turns import Turns
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ServerConfig
from fastserve.text.tokenizer import NO_TEMPLATE, Tokenizer
from fastserve.wire.engine_messages import EngineInfo


class Rendering(Protocol):
    """What makes prompts of messages, by the model's chat template."""

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Return the prompt; ValueError, in one line, for messages of which there is none."""


@dataclass(slots=True)
class ServerContext:
    """The parts behind the routes; `rendering` is there where a chat template is."""

    engine: EngineClient
    tokenizer: Tokenizer | None
    rendering: Rendering | None
    config: EngineConfig
    server_config: ServerConfig
    resumable: ResumableStreams | None = None  # none: a client that is lost ends its stream
    unread_fields: UnreadFields = field(default_factory=UnreadFields)
    bodies: Bodies = field(init=False)
    parsing: Turns = field(default_factory=Turns)
    text_pool: TextPool = field(default_factory=TextPool)
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False  # a stopping server finishes what it has and takes no more

    def __post_init__(self) -> None:
        """Bound the bodies by the largest that one may be."""
        self.bodies = Bodies(NUM_LARGEST * self.server_config.max_body_bytes)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names clients use."""
        return self.server_config.served_model_name or (public_name(self.config.model),)

    @property
    def model_name(self) -> str:
        """The name that answers bear."""
        return self.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raise 404 for another model's name; none means the one there is.

        Where it has no names of its own, what it was started by will do too, as in vLLM.
        """
        is_named = bool(self.server_config.served_model_name)
        if not is_named and name == self.config.model:
            return
        if name is not None and name not in self.model_names:
            raise ApiError(
                404,
                f"The model `{name}` does not exist or you do not have access to it.",
                param="model",
                code="model_not_found",
            )

    def check_priority(self, priority: int | None) -> None:
        """Raise 400 for a priority other than everybody's where none may be chosen."""
        if priority and not self.server_config.enable_priority:
            raise invalid("priority other than 0 is not enabled on this server.", "priority")

    def require_life(self) -> None:
        """Raise 503 once the engine is gone for good: only another process will help."""
        if self.engine.is_dead:
            raise engine_dead()

    def require_engine(self) -> EngineInfo:
        """Return what the engine is; 503 while it runs no requests, or is to take no more."""
        self.require_life()
        if self.is_draining:
            raise shutting_down()
        if self.engine.info is None or not self.engine.is_ready:
            stage, fraction = self.engine.progress
            raise unavailable(f"The model is loading ({stage}, {fraction:.0%}).", "loading")
        return self.engine.info

    def max_price(self, info: EngineInfo) -> int:
        """Return what a request may cost at most: one plain answer may fill the window."""
        return max(self.server_config.max_request_price, info.max_request_tokens)

    def require_place(self, num_choices: int) -> None:
        """Raise 429 while there is no place for so many more, 400 where there never will be."""
        limit = self.server_config.max_queued_requests
        if num_choices > limit:
            raise invalid(
                f"{num_choices} choices are more than the {limit} that this server holds at most.",
                "n",
            )
        if self.engine.num_requests + num_choices > limit:
            raise ApiError(
                429,
                f"The server holds {self.engine.num_requests} of at most {limit} requests and has "
                f"no place for {num_choices} more; retry later.",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def require_tokenizer(self, param: str) -> Tokenizer:
        """Return the tokenizer; 400 when the model has none."""
        if self.tokenizer is None:
            raise invalid("This model has no tokenizer; prompts must be token ids.", param)
        return self.tokenizer

    def require_rendering(self) -> Rendering:
        """Return what renders messages; 400 when the model has no chat template."""
        if self.rendering is None:
            raise invalid(NO_TEMPLATE, "messages")
        return self.rendering
