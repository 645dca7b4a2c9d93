"""A workload: when requests arrive and how long their prompts and answers are.

Rules: columns of numbers and labels, no text; rows in order of arrival. Every transformation
returns a new workload. Must not know: where the numbers come from, what serves them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastserve.settings.option import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

HASH_ID_TOKENS = 512
"""Prompt tokens that one of a row's `hash_ids` stands for."""


class WorkloadError(ConfigError):
    """A workload that cannot be run as asked; the message is one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """One row per request; optional columns are None where the workload does not have them.

    `client` is who asks and `tenant` on whose account, which policies may know; `source` groups
    rows in the report, where it stands in for `client`, and that for `tenant`. Equal `hash_ids`
    mean equal prompt blocks behind equal beginnings. Rows of one `session_id` are the turns of a
    conversation, in order, each thought about for `think_s` after the answer before it.
    """

    arrived_at: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    max_tokens: Ints | None = None
    client: tuple[str, ...] | None = None
    tenant: tuple[str, ...] | None = None
    source: tuple[str, ...] | None = None
    hash_ids: tuple[tuple[int, ...], ...] | None = None
    session_id: Ints | None = None
    think_s: Floats | None = None
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.arrived_at)

    def rows(self, index: npt.NDArray[np.intp]) -> Workload:
        """Return the rows of an index, in its order."""
        changes: dict[str, object] = {}
        for spec in dataclasses.fields(self):
            column = getattr(self, spec.name)
            if isinstance(column, np.ndarray):
                changes[spec.name] = column[index]
            elif isinstance(column, tuple):
                changes[spec.name] = tuple([column[row] for row in index.tolist()])
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def first(self, num_requests: int) -> Workload:
        """Return the first rows."""
        return self.rows(np.arange(min(num_requests, len(self))))

    def faster(self, rate_scale: float) -> Workload:
        """Return the same with `rate_scale` times as many arrivals a second."""
        return dataclasses.replace(self, arrived_at=self.arrived_at / rate_scale)

    def arriving(self, arrived_at: Floats) -> Workload:
        """Return the same with other times of arrival, in order."""
        return dataclasses.replace(self, arrived_at=np.sort(arrived_at))

    @property
    def rate(self) -> float:
        """Arrivals a second."""
        span = float(self.arrived_at[-1] - self.arrived_at[0]) if len(self) else 0.0
        return (len(self) - 1) / span if span > 0 else 1.0

    def fitted(self, window: int, oversize: str) -> Workload:
        """Return the rows that fit a window of so many tokens.

        Rows beyond it are an `error`, are left out (`drop`), or are cut (`clip`): the answer
        first, then the prompt.
        """
        limits = self.output_tokens if self.max_tokens is None else self.max_tokens
        too_long = self.prompt_tokens + limits > window
        if not too_long.any():
            return self
        if oversize == "clip":
            prompt = np.minimum(self.prompt_tokens, window - 1)
            left = window - prompt
            return dataclasses.replace(
                self,
                prompt_tokens=prompt,
                output_tokens=np.minimum(self.output_tokens, left),
                max_tokens=None if self.max_tokens is None else np.minimum(self.max_tokens, left),
            )
        if oversize == "drop":
            kept = self.rows(np.flatnonzero(~too_long))
            dropped = self.num_dropped + int(too_long.sum())
            return dataclasses.replace(kept, num_dropped=dropped)
        row = int(np.argmax(too_long))
        raise WorkloadError(
            f"row {row + 1} needs {self.prompt_tokens[row]} + {limits[row]} tokens and "
            f"the window has {window} ({int(too_long.sum())} of {len(self)} rows do not fit; "
            "--oversize drop or clip)"
        )

    def prompts(self) -> Prompts:
        """Return the prompts, made when they are asked for."""
        return Prompts(self)

    def next_turns(self) -> dict[int, int]:
        """Return the row that follows a row in its session."""
        following: dict[int, int] = {}
        latest: dict[int, int] = {}
        if self.session_id is not None:
            for row, session in enumerate(self.session_id.tolist()):
                if session in latest:
                    following[latest[session]] = row
                latest[session] = row
        return following


class Prompts:
    """Prompts as ranges of ids that no other prompt has, so that only `hash_ids` make hits."""

    def __init__(self, workload: Workload) -> None:
        lengths = workload.prompt_tokens.tolist()
        # From 2 on: 0 and 1 are the ids that the simulated device draws.
        self._starts = (np.cumsum([2, *lengths])[:-1]).tolist()
        self._lengths = lengths
        self._hash_ids = workload.hash_ids

    def __getitem__(self, row: int) -> range:
        start = self._starts[row]
        return range(start, start + self._lengths[row])

    def block_hashes(self, row: int, block_size: int) -> list[bytes] | None:
        """Return the prefix hash of each full KV block; None where ids are all there is."""
        if self._hash_ids is None:
            return None
        return expand_hash_ids(self._hash_ids[row], self._lengths[row], block_size)


def expand_hash_ids(hash_ids: Sequence[int], num_tokens: int, block_size: int) -> list[bytes]:
    """Return one hash per full KV block of a prompt from its ids of 512 tokens each."""
    per_id = HASH_ID_TOKENS // block_size
    num_blocks = min(num_tokens // block_size, len(hash_ids) * per_id)
    return [
        hash_ids[index // per_id].to_bytes(8, "little") + (index % per_id).to_bytes(4, "little")
        for index in range(num_blocks)
    ]
