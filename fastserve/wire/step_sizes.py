"""How large steps were: counts in buckets, as plain numbers that a message can carry.

Must not know: how they are exported.
"""

from __future__ import annotations

from bisect import bisect_left

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # vLLM's


class StepSizes:
    """Steps by the tokens they computed."""

    def __init__(self) -> None:
        self.counts = [0] * (len(STEP_TOKENS) + 1)  # up to each bound; the last: above them all
        self.total = 0

    def add(self, num_tokens: int) -> None:
        """Count one step."""
        self.counts[bisect_left(STEP_TOKENS, num_tokens)] += 1
        self.total += num_tokens
