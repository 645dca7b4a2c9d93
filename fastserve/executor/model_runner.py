"""ModelRunner: one plan's work in, samples out.

Rules: turns Works into an InputBatch, runs the network, and draws one token for each Work that asks
for it, in the plan's order. The common case (every row greedy, nothing to score) takes no detour.
Must not know: scheduling, which request owns a block, threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastserve.core.messages import Sample, TokenLogprobs, Work
from fastserve.core.request import Handle
from fastserve.executor.request_table import RequestState, RequestTable
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.families.architectures import Network
from fastserve.model.input_batch import InputBatch, IntArray, build_input_batch, order_rows
from fastserve.model.sampler import NO_TOKEN, Adjustments, Draws, ScoredTokens, sample, score


class ModelRunner:
    """Runs steps of one model over one KV tensor."""

    def __init__(
        self, model: Network, kv: PagedKV, table: RequestTable, device: torch.device
    ) -> None:
        self.model = model
        self.kv = kv
        self.table = table
        self.device = device
        self.input_device = device

    def run(
        self, works: Sequence[Work], states: Sequence[RequestState]
    ) -> tuple[list[Sample], dict[Handle, list[TokenLogprobs]]]:
        """Compute one step; `states` are those of `works`, already advanced.

        Without logits there are no samples: another rank has both, or none is asked for.
        """
        order = order_rows([work.start for work in works], [work.num_tokens for work in works])
        token_ids: list[int] = []
        last_tokens = [0] * len(works)  # where in the batch each work ends
        for index in order:
            work, known_ids = works[index], states[index].token_ids
            token_ids += known_ids[work.start : work.start + work.num_tokens]
            last_tokens[index] = len(token_ids) - 1
        sampled = [index for index, work in enumerate(works) if work.sample]
        everything = [index for index, work in enumerate(works) if work.logits == "all"]
        scored = [last_tokens[index] for index in sampled]
        for index in everything:
            stop = last_tokens[index] + 1
            scored += range(stop - works[index].num_tokens, stop)

        batch = self._build(
            [works[index] for index in order],
            np.array([states[index].row for index in order], np.int64),
            token_ids,
            None if scored == list(range(len(token_ids))) else scored,
        )
        logits = self.model(batch, self.kv)
        if not len(logits):
            return [], {}
        samples = self._sample(
            logits[: len(sampled)] if everything else logits,
            [states[index] for index in sampled],
            [works[index].start + works[index].num_tokens for index in sampled],
        )
        prompt_logprobs: dict[Handle, list[TokenLogprobs]] = {}
        offset = len(sampled)
        for index in everything:
            work = works[index]
            part = logits[offset : offset + work.num_tokens]
            prompt_logprobs[work.handle] = _score_prompt(part, work, states[index])
            offset += work.num_tokens
        return samples, prompt_logprobs

    def _build(
        self,
        works: Sequence[Work],
        rows: IntArray,  # of the table
        token_ids: Sequence[int],
        scored: Sequence[int] | None,
    ) -> InputBatch:
        """Build the batch of works that come in its order."""
        starts = np.array([work.start for work in works], np.int64)
        counts = np.array([work.num_tokens for work in works], np.int64)
        block_size = self.kv.block_size
        width = -(-max([work.start + work.num_tokens for work in works]) // block_size)
        return build_input_batch(
            token_ids=np.array(token_ids, np.int64),
            starts=starts,
            counts=counts,
            tables=self.table.blocks[rows, :width],
            scored=None if scored is None else np.array(scored, np.int64),
            block_size=block_size,
            device=self.input_device,
        )

    def _sample(
        self, logits: Tensor, states: Sequence[RequestState], positions: Sequence[int]
    ) -> list[Sample]:
        """Draw the id at `positions` of each row, and add it to what the worker knows."""
        if not states:
            return []
        if all(state.is_plain for state in states):
            drawn = sample(logits, None, None)
            return [Sample(token_id) for token_id in self._take(drawn, states, positions)]
        table = self.table
        rows = np.array([state.row for state in states], np.int64)
        places = np.array(positions, np.int64)
        drawn = sample(logits, self._draws(rows, places), self._adjustments(states, rows, places))
        token_ids = self._take(drawn, states, positions)
        num_logprobs = table.num_logprobs[rows]
        samples = [Sample(token_id) for token_id in token_ids]
        if (num_logprobs >= 0).any():
            wanting = np.flatnonzero((num_logprobs >= 0) & (drawn.cpu().numpy() != NO_TOKEN))
            chosen = torch.from_numpy(wanting).to(self.device)
            scores = score(logits[chosen], drawn[chosen], int(num_logprobs.max()))
            for place, index in enumerate(wanting.tolist()):
                logprobs = _token_logprobs(scores, place, int(num_logprobs[index]))
                samples[index] = Sample(token_ids[index], logprobs)
        return samples

    def _take(
        self, drawn: Tensor, states: Sequence[RequestState], positions: Sequence[int]
    ) -> list[int]:
        """Bring drawn ids to the host, and add each to what is known of its request.

        Where there is none a step may still follow, of which nobody will hear: it gets id 0.
        """
        token_ids: list[int] = drawn.tolist()
        for state, position, token_id in zip(states, positions, token_ids, strict=True):
            state.token_ids[position:] = (max(token_id, 0),)
        return token_ids

    def _draws(self, rows: IntArray, positions: IntArray) -> Draws | None:
        table = self.table
        is_greedy = table.is_greedy[rows]
        if is_greedy.all():
            return None
        return Draws(
            is_greedy=is_greedy,
            temperature=table.temperature[rows],
            top_k=table.top_k[rows],
            top_p=table.top_p[rows],
            min_p=table.min_p[rows],
            seeds=table.seed[rows],
            positions=positions,
        )

    def _adjustments(
        self, states: Sequence[RequestState], rows: IntArray, positions: IntArray
    ) -> Adjustments | None:
        table = self.table
        biased = table.has_bias[rows]
        is_short = positions - table.num_prompt_tokens[rows] < table.min_tokens[rows]
        penalized = table.has_penalty[rows]
        if not (biased.any() or is_short.any() or penalized.any()):
            return None
        biases = {i: states[i].params.logit_bias for i in np.flatnonzero(biased).tolist()}
        banned = {i: states[i].banned_ids for i in np.flatnonzero(is_short).tolist()}
        seen = {
            i: _seen_counts(states[i], int(positions[i]))
            for i in np.flatnonzero(penalized).tolist()
        }
        bias_rows, bias_ids = _entries(biases)
        banned_rows, banned_ids = _entries(banned)
        seen_rows, seen_ids = _entries(seen)
        return Adjustments(
            bias_rows=bias_rows,
            bias_ids=bias_ids,
            bias=_floats([value for bias in biases.values() for value in bias.values()]),
            banned_rows=banned_rows,
            banned_ids=banned_ids,
            seen_rows=seen_rows,
            seen_ids=seen_ids,
            seen_counts=_floats([count for ids in seen.values() for count in ids.values()]),
            repetition=table.repetition[rows],
            presence=table.presence[rows],
            frequency=table.frequency[rows],
        )


def _entries(
    ids_by_row: Mapping[int, Mapping[int, float] | Sequence[int]],
) -> tuple[IntArray, IntArray]:
    """Flatten ids by row to the two index arrays of single logits."""
    rows = [row for row, ids in ids_by_row.items() for _ in ids]
    ids = [token_id for ids in ids_by_row.values() for token_id in ids]
    return np.array(rows, np.int64), np.array(ids, np.int64)


def _floats(values: Sequence[float]) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def _seen_counts(state: RequestState, position: int) -> dict[int, float]:
    """Return every id before `position`, with how often the output holds it."""
    ids = np.array(state.token_ids[:position], np.int64)
    unique, inverse = np.unique(ids, return_inverse=True)
    counts = np.bincount(inverse[state.num_prompt_tokens :], minlength=len(unique))
    return dict(zip(unique.tolist(), counts.tolist(), strict=True))


def _score_prompt(logits: Tensor, work: Work, state: RequestState) -> list[TokenLogprobs]:
    """Score the prompt ids of one chunk.

    The id after the chunk is not known yet: the last row of logits is kept for the next chunk.
    """
    stop = min(work.start + work.num_tokens, state.num_prompt_tokens)
    first = work.start + 1
    rows = logits[: max(stop - first, 0)]
    if state.last_logits is not None and work.start < stop:
        rows = torch.cat((state.last_logits, rows))
        first = work.start
    state.last_logits = None
    if work.start + work.num_tokens < state.num_prompt_tokens:
        state.last_logits = logits[-1:].clone()
    if stop <= first:
        return []
    k = state.params.prompt_logprobs or 0
    targets = torch.tensor(state.token_ids[first:stop], device=logits.device)
    scores = score(rows, targets, k)
    return [_token_logprobs(scores, index, k) for index in range(len(targets))]


def _token_logprobs(scores: ScoredTokens, index: int, k: int) -> TokenLogprobs:
    return TokenLogprobs(
        float(scores.logprobs[index]),
        int(scores.ranks[index]),
        scores.top_ids[index, :k].tolist(),
        scores.top_logprobs[index, :k].tolist(),
    )
