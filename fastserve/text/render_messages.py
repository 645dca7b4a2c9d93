"""What the API process and a process that renders say to each other.

Must not know: processes, templates.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Template(msgspec.Struct, tag=True, frozen=True):
    """The first message: what is rendered, and the processor time that a conversation may take."""

    source: str
    special_tokens: Mapping[str, str]
    cpu_limit_s: float


class Conversation(msgspec.Struct, tag=True, frozen=True):
    """One conversation; JSON, whose numbers msgpack cannot all carry."""

    messages: str
    variables: str
    add_generation_prompt: bool
    continue_final_message: bool


class Rendered(msgspec.Struct, tag=True, frozen=True):
    """The prompt that a conversation is."""

    text: str


class Refused(msgspec.Struct, tag=True, frozen=True):
    """Why there is none, for the client."""

    message: str


_orders: msgspec.msgpack.Decoder[Template | Conversation]
_orders = msgspec.msgpack.Decoder(Template | Conversation)
_answers: msgspec.msgpack.Decoder[Rendered | Refused]
_answers = msgspec.msgpack.Decoder(Rendered | Refused)


def decode_order(payload: bytes) -> Template | Conversation:
    """Return what a process is told."""
    return _orders.decode(payload)


def decode_answer(payload: bytes) -> Rendered | Refused:
    """Return what it says."""
    return _answers.decode(payload)
