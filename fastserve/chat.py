"""`fastserve chat`: a conversation in the terminal.

Rules: the whole conversation is sent every time, and what was said before is found in the prefix
cache. A turn that fails leaves the conversation as it was. Must not know: how text is generated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.core.request import SamplingParams
    from fastserve.llm import LLM

HELP = "/reset starts over, /exit ends; Ctrl-C stops an answer."
ROOM_FOR_A_TURN = 32
Message = dict[str, str]


def converse(llm: LLM, params: SamplingParams, *, system: str | None = None) -> int:
    """Read lines and stream answers until /exit or the end of input; return the exit code."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # no line editing on this Python
            import readline  # noqa: F401
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    print(HELP)
    while (line := read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return 0
            case "/reset":
                history = list(opening)
                print("(starting over)")
            case command if command.startswith("/"):
                print(f"(no command {command}. {HELP})")
            case text:
                history = take_turn(llm, params, history, text)
    return 0


def read_line() -> str | None:
    """Return the next line, "" if it was interrupted, None at the end of input."""
    try:
        return input("\nyou> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        return ""


def take_turn(llm: LLM, params: SamplingParams, history: list[Message], text: str) -> list[Message]:
    """Stream the answer to `text` and return the conversation that includes both."""
    asked = [*history, {"role": "user", "content": text}]
    window = llm.info.max_request_tokens
    size = num_tokens(llm, asked)
    if size >= window:
        print(f"({size} tokens would not fit the window of {window}. Not sent; {HELP})")
        return history
    if params.max_tokens is not None:
        params = dataclasses.replace(params, max_tokens=min(params.max_tokens, window - size))
    answer = ""
    try:
        for delta in llm.stream(asked, params):
            print(delta, end="", flush=True)
            answer += delta
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    answered = [*asked, {"role": "assistant", "content": answer}]
    left = max(0, window - num_tokens(llm, answered))
    if left < ROOM_FOR_A_TURN:
        print(f"({left} of the window's {window} tokens are left. {HELP})")
    return answered


def num_tokens(llm: LLM, history: list[Message]) -> int:
    """Return the size of a conversation as the model sees it."""
    return len(llm.get_tokenizer().encode_chat(history))
