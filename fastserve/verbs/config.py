"""What the verbs at the terminal take beside the engine's settings: generate, chat, top.

Must not know: how the verbs work.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.settings.option import check_ranges, option


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """How `generate` and `chat` draw tokens; unset ones are the model's own."""

    max_tokens: int | None = option(
        None, "most tokens of one answer (what the window leaves)", minimum=1
    )
    temperature: float | None = option(None, "0 takes the most likely token", minimum=0.0)
    top_p: float | None = option(None, "share of probability to draw from", maximum=1.0)
    top_k: int | None = option(None, "number of tokens to draw from; 0: all", minimum=-1)
    min_p: float | None = option(
        None, "least probability, relative to the best token's", minimum=0.0, maximum=1.0
    )
    repetition_penalty: float | None = option(None, "above 1 discourages repetition")

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopConfig:
    """What `top` watches."""

    url: str = option("http://127.0.0.1:8000", "address of the server", positional=True)
    api_key: str | None = option(
        None, "bearer token, where it asks for one (the first of the variable FASTSERVE_API_KEY)"
    )
    interval: float = option(1.0, "seconds between two looks", minimum=0.1)
    once: bool = option(False, "print one picture and end")

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)
