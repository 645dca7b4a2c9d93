"""CostModel: the one place that says how long prefill, decode and copies take.

Skip-join, ENST, billing and the simulator all ask here. Coefficients come from a profile of the
actual model on the actual device, or from published tables. Must not know: how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

TERMS = {
    "base_s": "a step, whatever is in it",
    "prefill_token_s": "a prompt token",
    "prefill_pair_s": "a prompt token, for each token it attends to",
    "decode_seq_s": "a sequence that decodes",
    "decode_context_s": "a decode, for each token it attends to",
    "matrix_s": "a step of more than one token",
}
"""What each fitted coefficient is the price of, in the order of `step_terms`."""


def step_terms(shares: Iterable[tuple[int, int]]) -> tuple[float, ...]:
    """Return what each of TERMS is multiplied by in a step; a share is (num_tokens, start).

    A share of one token is a decode.
    """
    num_prefill = num_decodes = context = 0
    pairs = 0.0
    for num_tokens, start in shares:
        if num_tokens == 1:
            num_decodes += 1
            context += start + 1
        else:
            num_prefill += num_tokens
            pairs += num_tokens * (start + num_tokens / 2)
    is_matrix = num_prefill or num_decodes > 1
    return 1.0, num_prefill, pairs, num_decodes, context, 1.0 if is_matrix else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of one step.

    step = base + matrix + max(floor, prefill_token · Σ tokens + decode_seq · decodes)
                + prefill_pair · Σ tokens · (start + tokens / 2) + decode_context · Σ context
    where a share of one token is a decode and `context` counts the tokens it attends to. `matrix`
    is paid by a step of more than one token, whose products are of matrices. The floor is what
    reading the weights takes: computing few tokens hides behind it.
    """

    base_s: float
    prefill_token_s: float
    prefill_pair_s: float = 0.0
    decode_seq_s: float = 0.0
    decode_context_s: float = 0.0
    matrix_s: float = 0.0
    floor_s: float = 0.0
    copy_base_s: float = 0.0
    copy_block_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a model under which work is free: no quantum could be derived from it."""
        if self.min_iteration_s <= 0.0:
            raise ValueError(f"the minimum iteration time must be positive: {self}")

    def shared_by(self, num_slots: int) -> CostModel:
        """Return the costs in seconds of a machine that has so many steps in flight at once."""
        if num_slots == 1:
            return self
        own = {name: getattr(self, name) / num_slots for name in (*TERMS, "floor_s")}
        return replace(self, **own)

    @property
    def min_iteration_s(self) -> float:
        """Seconds of the shortest step there is: one decode with one token of context."""
        return self.iteration_s(1, 0)

    def decode_s(self, start: int) -> float:
        """Return the seconds of a step that decodes the token at position `start`, alone."""
        dense_s = self.decode_seq_s if self.decode_seq_s > self.floor_s else self.floor_s
        return self.base_s + dense_s + self.decode_context_s * (start + 1)

    def iteration_s(self, num_tokens: int, start: int) -> float:
        """Return the seconds of a step with one share: positions [start, start + num_tokens)."""
        if num_tokens == 1:
            return self.decode_s(start)
        dense_s = num_tokens * self.prefill_token_s
        attention_s = num_tokens * self.prefill_pair_s * (start + num_tokens / 2)
        return self.base_s + self.matrix_s + max(self.floor_s, dense_s) + attention_s

    def prefill_s(self, num_tokens: int, start: int, max_chunk: int) -> float:
        """Return the seconds to prefill [start, start + num_tokens) in chunks, alone."""
        num_full, rest = divmod(num_tokens, max_chunk)
        dense_s = num_full * max(self.floor_s, max_chunk * self.prefill_token_s)
        if rest:
            dense_s += max(self.floor_s, rest * self.prefill_token_s)
        attention_s = num_tokens * self.prefill_pair_s * (start + num_tokens / 2)
        num_steps = num_full + bool(rest)
        return num_steps * (self.base_s + self.matrix_s) + dense_s + attention_s

    def step_s(self, shares: Iterable[tuple[int, int]]) -> float:
        """Return the seconds of a step; a share is (num_tokens, start)."""
        _, num_prefill, pairs, num_decodes, context, is_matrix = step_terms(shares)
        dense_s = num_prefill * self.prefill_token_s + num_decodes * self.decode_seq_s
        attention_s = pairs * self.prefill_pair_s + context * self.decode_context_s
        return self.base_s + self.matrix_s * is_matrix + max(self.floor_s, dense_s) + attention_s

    def decode_share_s(self, num_seqs: float, context: float) -> float:
        """Return one sequence's part of a step of so many decodes, at so much context of its own.

        What a token of an answer costs while others use the rest of the step.
        """
        dense_s = max(self.floor_s, num_seqs * self.decode_seq_s)
        matrix_s = self.matrix_s if num_seqs > 1 else 0.0
        shared_s = (self.base_s + matrix_s + dense_s) / num_seqs
        return shared_s + self.decode_context_s * context

    def seat_token_s(
        self, context: float, mean_context: float, *, num_seats: int, num_kv_tokens: int
    ) -> float:
        """Return what a token of an answer costs a full batch, at so much context of its own.

        A sequence takes up one of `num_seats`; where KV lasts for fewer sequences of the mean
        context than there are seats, it takes up the seats of others with the KV that it holds.
        """
        num_held = max(num_kv_tokens / mean_context, 1.0)
        if num_held >= num_seats:
            return self.decode_share_s(num_seats, context)
        return self.decode_share_s(num_held, mean_context) * context / mean_context

    def added_prefill_s(self, num_tokens: int, start: int) -> float:
        """Return what a share of a prompt adds to a step whose weights are read anyway."""
        pairs = start + num_tokens / 2
        return num_tokens * (self.prefill_token_s + self.prefill_pair_s * pairs)

    def copy_s(self, num_blocks: int) -> float:
        """Return the seconds to move blocks between the tiers."""
        return self.copy_base_s + self.copy_block_s * num_blocks
