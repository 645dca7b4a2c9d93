"""Places: which block-sized places of one tier hold nothing.

Rules: the last place given back is the next to be taken; places that were never taken cost nothing,
so that a tier may be boundless. Must not know: what sits in a place, which tier it is.
"""

from __future__ import annotations

from collections.abc import Sequence


class Places:
    """The free places among [0, total)."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._given_back: list[int] = []
        self._num_touched = 0  # places from here on have never been taken

    @property
    def num_free(self) -> int:
        """Places that hold nothing."""
        return self.total - self._num_touched + len(self._given_back)

    def take(self) -> int:
        """Return a free place, which then is not. The caller has seen that there is one."""
        if self._given_back:
            return self._given_back.pop()
        assert self._num_touched < self.total, "no place is free"
        self._num_touched += 1
        return self._num_touched - 1

    def give_back(self, place: int) -> None:
        """Make a place free."""
        self._given_back.append(place)

    def check(self, taken: Sequence[int]) -> None:
        """Assert that exactly these are not free, each of them once."""
        assert self._num_touched <= self.total
        places = sorted([*self._given_back, *taken])
        assert places == list(range(self._num_touched)), f"places are not a partition: {places}"
