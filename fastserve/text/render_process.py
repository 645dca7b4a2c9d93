"""A process that renders conversations, one after the other: `python -m …render_process FD`.

A template is foreign code, and what it is given decides how long it runs and what it takes. Rules:
one conversation may take so much time of a processor, upon which the kernel ends the process, and
so much memory, upon which its rendering fails.
Must not know: HTTP, ids, who is at the other end.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Sequence
from typing import BinaryIO

from fastserve.text.chat_renderer import ChatRenderer
from fastserve.text.render_messages import (
    Conversation,
    Refused,
    Rendered,
    Template,
    decode_order,
)
from fastserve.wire.child import be_child
from fastserve.wire.frames import encode_frame, read_frame

MEMORY_LIMIT_BYTES = 2**30  # of addresses, the interpreter's included
MAX_TEXT_CHARS = 2**24


def serve(orders: BinaryIO, answers: BinaryIO) -> None:
    """Answer each conversation, until there are no more."""
    template: Template | None = None
    while (payload := read_frame(orders)) is not None:
        order = decode_order(payload)
        if isinstance(order, Template):
            template, renderer = order, ChatRenderer(order.source, order.special_tokens)
            answer: Rendered | Refused = Rendered("")  # says that it is ready
        else:
            assert template is not None
            signal.setitimer(
                signal.ITIMER_PROF, template.cpu_limit_s
            )  # its signal ends the process
            answer = rendered(renderer, order)
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(encode_frame(answer))
        answers.flush()


def rendered(renderer: ChatRenderer, order: Conversation) -> Rendered | Refused:
    """Render one conversation."""
    try:
        text = renderer.render(
            json.loads(order.messages),
            add_generation_prompt=order.add_generation_prompt,
            continue_final_message=order.continue_final_message,
            variables=json.loads(order.variables),
        )
    except ValueError as error:
        return Refused(" ".join(str(error).split()))
    if len(text) > MAX_TEXT_CHARS:
        return Refused(f"The chat template makes a prompt of {len(text)} characters of these.")
    return Rendered(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the socket whose number is the argument."""
    (number,) = sys.argv[1:] if argv is None else argv
    connection = be_child(int(number))
    if sys.platform == "linux":  # elsewhere addresses are not counted
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with connection, connection.makefile("rb") as orders, connection.makefile("wb") as answers:
        serve(orders, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
