"""RequestTable: what a worker remembers of each request between steps.

Rules: what a step needs of many requests at once lies in arrays with one row per request, so that
a step is prepared by indexing, not by looping over settings. Block tables change only where a plan
says so. Must not know: the model, which requests run next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastserve.core.messages import NewRequest, Work
from fastserve.core.request import Handle, SamplingParams

# From here on every id is as likely as any other; a banned id's -inf over more would be no number.
MAX_TEMPERATURE = 1e30


class RequestState:
    """One request in one epoch; `token_ids` are all ids it knows, the last sample included.

    A negative one stands for a sample that is still on the device (AsyncModelRunner).
    """

    __slots__ = (
        "banned_ids",
        "epoch",
        "is_plain",
        "last_logits",
        "num_prompt_tokens",
        "params",
        "row",
        "token_ids",
    )

    def __init__(self, new: NewRequest, row: int, eos_token_ids: frozenset[int]) -> None:
        self.epoch = new.epoch
        self.row = row
        self.num_prompt_tokens = new.num_prompt_tokens
        self.params: SamplingParams = new.params
        self.is_plain = new.params.is_plain
        self.token_ids: list[int] = list(new.cached_token_ids)
        ending = new.params.ending_ids(eos_token_ids) if new.params.min_tokens else ()
        self.banned_ids = sorted(ending)  # until there are min_tokens
        self.last_logits: Tensor | None = None  # score the first id of the next prompt chunk


class RequestTable:
    """All requests a worker holds state of."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._states: dict[Handle, RequestState] = {}
        self._free_rows: list[int] = []
        self.blocks: npt.NDArray[np.int64] = np.zeros((0, 1), np.int64)  # [rows, blocks]
        self.num_blocks: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.num_prompt_tokens: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.min_tokens: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.is_greedy: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.has_bias: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.has_penalty: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.num_logprobs: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # -1: none asked for
        self.temperature: npt.NDArray[np.float32] = np.zeros(0, np.float32)
        self.top_k: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.top_p: npt.NDArray[np.float32] = np.zeros(0, np.float32)
        self.min_p: npt.NDArray[np.float32] = np.zeros(0, np.float32)
        self.seed: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.repetition: npt.NDArray[np.float32] = np.zeros(0, np.float32)
        self.presence: npt.NDArray[np.float32] = np.zeros(0, np.float32)
        self.frequency: npt.NDArray[np.float32] = np.zeros(0, np.float32)

    def __getitem__(self, handle: Handle) -> RequestState:
        return self._states[handle]

    def __len__(self) -> int:
        return len(self._states)

    def add(self, new: NewRequest) -> None:
        """Begin an epoch: what was known of the request is replaced."""
        self.forget(new.handle)
        if not self._free_rows:
            self._grow_rows()
        row = self._free_rows.pop()
        self._states[new.handle] = RequestState(new, row, self._eos_token_ids)
        params = new.params
        self.num_blocks[row] = 0
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        self.min_tokens[row] = params.min_tokens
        self.is_greedy[row] = params.is_greedy
        self.has_bias[row] = bool(params.logit_bias)
        self.has_penalty[row] = params.has_penalty
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.temperature[row] = min(params.temperature, MAX_TEMPERATURE)
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seed[row] = params.seed or 0
        self.repetition[row] = params.repetition_penalty
        self.presence[row] = params.presence_penalty
        self.frequency[row] = params.frequency_penalty

    def forget(self, handle: Handle) -> None:
        """Drop a request, if it is known."""
        state = self._states.pop(handle, None)
        if state is not None:
            self._free_rows.append(state.row)

    def named(self, handle: Handle) -> tuple[list[int], int]:
        """Return the blocks that a request's table names, and how many of its ids are known."""
        state = self._states.get(handle)
        if state is None:
            return [], 0
        blocks: list[int] = self.blocks[state.row, : self.num_blocks[state.row]].tolist()
        return blocks, len(state.token_ids)

    def advance(self, work: Work) -> RequestState:
        """Take in what a plan says of one request: new ids and changes of its block table."""
        state = self._states[work.handle]
        if state.epoch != work.epoch:
            raise RuntimeError(
                f"request {work.handle}: work of epoch {work.epoch}, state of {state.epoch}"
            )
        if work.block_ids:
            self._set_blocks(state.row, work.table_from, work.block_ids)
        start, ids = work.start, state.token_ids
        if len(ids) >= start:
            ids[start : start + len(work.token_ids)] = work.token_ids
        if len(ids) < start + work.num_tokens:
            raise RuntimeError(
                f"request {work.handle}: {len(ids)} ids known, work reaches "
                f"{start + work.num_tokens}"
            )
        return state

    def _set_blocks(self, row: int, table_from: int, block_ids: Any) -> None:
        stop = table_from + len(block_ids)
        width = self.blocks.shape[1]
        if stop > width:
            wider = np.zeros((len(self.blocks), max(stop, 2 * width)), np.int64)
            wider[:, :width] = self.blocks
            self.blocks = wider
        self.blocks[row, table_from:stop] = block_ids
        self.num_blocks[row] = stop

    def _grow_rows(self) -> None:
        old = len(self.blocks)
        new = max(16, 2 * old)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                grown = np.zeros((new, *value.shape[1:]), value.dtype)
                grown[:old] = value
                setattr(self, name, grown)
        self._free_rows += range(new - 1, old - 1, -1)
