"""`fastserve chat`: a conversation in the terminal.

Rules: the whole conversation is sent every time, and what was said before is found in the prefix
cache. A turn that fails leaves the conversation as it was. Must not know: how text is generated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from typing import TYPE_CHECKING

from fastserve.host.streams import is_text

if TYPE_CHECKING:
    from fastserve.llm import LLM
    from fastserve.offline.sampling_params import SamplingParams

HINT = "/reset starts over, /quit ends, /help tells more."
HELP = """\
/reset  start over
/quit   end; /exit and Ctrl-D do too
/help   show this
Ctrl-C  stop an answer"""
ROOM_FOR_A_TURN = 32
Message = dict[str, str]


def converse(llm: LLM, params: SamplingParams, *, system: str | None = None) -> int:
    """Read lines and stream answers until /quit or the end of input; return the exit code.

    Raises ValueError when the model cannot chat at all, or not with this system message.
    """
    if system is not None and not is_text(system):
        raise ValueError("--system: not UTF-8 text")
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    num_tokens(llm, [*opening, {"role": "user", "content": "Hello"}])
    prepare_input()
    history = list(opening)
    info = llm.info
    dtype = (
        info.dtype if info.quantization is None else f"{info.dtype}, {info.quantization} weights"
    )
    print(f"{info.model}, {dtype} on {info.device}, a window of {info.max_request_tokens}.")
    print(HINT)
    while (line := read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/quit" | "/exit":
                return 0
            case "/help":
                print(HELP)
            case "/reset":
                history = list(opening)
                print("(starting over)")
            case command if command.startswith("/"):
                print(f"(no command {command.split()[0]}. {HINT})")
            case text:
                history = take_turn(llm, params, history, text)
    return 0


def prepare_input() -> None:
    """Let lines be edited at a terminal, and bytes that are no text reach `read_line`."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # no line editing on this Python
            import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Strict decoding would drop the lines that were read together with the bad one.
        sys.stdin.reconfigure(errors="surrogateescape")


def read_line() -> str | None:
    """Return the next line, "" if it cannot be used, None at the end of input."""
    try:
        line = input("\nyou> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        return ""
    if not is_text(line):
        print("(not sent: this is not UTF-8 text)")
        return ""
    return line


def take_turn(llm: LLM, params: SamplingParams, history: list[Message], text: str) -> list[Message]:
    """Stream the answer to `text` and return the conversation that includes both."""
    asked = [*history, {"role": "user", "content": text}]
    window = llm.info.max_request_tokens
    answer = ""
    try:
        size = num_tokens(llm, asked)
    except ValueError as error:  # a template that refuses this message may take another
        print(f"(not sent: {' '.join(str(error).split())})")
        return history
    if size >= window:
        print(f"(not sent: {size} tokens would not fit the window of {window}. {HINT})")
        return history
    if params.max_tokens is not None:
        params = dataclasses.replace(params, max_tokens=min(params.max_tokens, window - size))
    try:
        for delta in llm.stream(asked, params):
            print(delta, end="", flush=True)
            answer += delta
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    # Not by the template: one may refuse a conversation that ends with an answer.
    spent = size + len(llm.get_tokenizer().encode(answer, add_special_tokens=False))
    if window - spent < ROOM_FOR_A_TURN:
        left = max(0, window - spent)
        print(f"({left} of the window's {window} tokens are left. {HINT})")
    return [*asked, {"role": "assistant", "content": answer}]


def num_tokens(llm: LLM, history: list[Message]) -> int:
    """Return the size of a conversation as the model sees it."""
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
    return len(ids)
