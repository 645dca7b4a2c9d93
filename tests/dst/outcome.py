"""What seeds came to, in figures, and what is counted along the way.

Must not know: how anything came about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

STATS = (
    "num_steps",
    "num_preemptions",
    "num_demotions",
    "num_promotions",
    "num_recomputed_tokens",
    "num_cached_prompt_tokens",
    "num_dropped_samples",
    "num_swaps",
    "num_swapped_out_blocks",
    "num_swapped_in_blocks",
    "num_saved_blocks",
    "num_fetched_blocks",
    "num_clean_blocks",
)
"""What of the engines' statistics says that a thing was put to the test."""


@dataclass
class Outcome:
    """What became of a seed, or of several."""

    num_requests: int = 0
    num_tokens: int = 0  # that clients read
    num_moves: int = 0  # of requests to another engine process
    virtual_s: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    stats: Counter[str] = field(default_factory=Counter)
    sha256: str = ""  # of the story

    def add(self, other: Outcome) -> None:
        """Take in another's counts."""
        self.num_requests += other.num_requests
        self.num_tokens += other.num_tokens
        self.num_moves += other.num_moves
        self.virtual_s += other.virtual_s
        for mine, its in (
            (self.ends, other.ends),
            (self.faults, other.faults),
            (self.stats, other.stats),
        ):
            mine.update(its)


class Tallies:
    """Counts like `EngineMetrics` what must agree with what clients have seen."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_ended = 0
        self.num_resumed = 0

    def generated(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens

    def finished(self, *about: object) -> None:
        self.num_ended += 1

    def resumed(self) -> None:
        self.num_resumed += 1

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in ("loaded", "first_token", "next_tokens", "snapshot"):
            return lambda *about: None
        raise AttributeError(name)
