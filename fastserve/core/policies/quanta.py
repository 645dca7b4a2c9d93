"""The quantum of each level of a feedback queue, and how far a request falls.

Must not know: requests, queues.
"""

from __future__ import annotations


class Quanta:
    """Level i has q₁ · ratioⁱ seconds; levels come into being as they are asked for."""

    def __init__(self, first_s: float, ratio: float) -> None:
        self.seconds = [first_s]
        self._ratio = ratio

    def reach(self, level: int) -> None:
        """Make sure that `seconds` has the level."""
        while len(self.seconds) <= level:
            self.seconds.append(self.seconds[-1] * self._ratio)

    def holding(self, seconds: float) -> int:
        """Return min{i : qᵢ ≥ seconds}."""
        level = 0
        while self.seconds[level] < seconds:
            level += 1
            self.reach(level)
        return level


def skip_levels(quanta: Quanta, level: int, next_s: float) -> int:
    """Return the next level below `level` that holds an iteration of `next_s` seconds."""
    return max(level + 1, quanta.holding(next_s))


def one_level(quanta: Quanta, level: int, next_s: float) -> int:
    """Return the level below `level`, whatever the next iteration takes."""
    return level + 1
