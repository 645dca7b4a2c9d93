"""The Gittins index of an answer of unknown length: how dear its completion is, seen from here.

The least, over all ages u at which one might stop looking, of the work until the answer ends or u
is reached over the worth of it ending by then (Gittins 1979; for queues: Aalto, Ayesta, Righter
2009):  G(e) = min over u > e of  (first + τ · E[min(O, u) − e]) / E[w(O) · 1{O ≤ u}],  all given
that O > e, where e tokens are out, `first` is the work before the next one, τ that of a token.
An answer of O tokens is worth w(O) = (O / Ō)^−β: β = 0 counts answers, β = 1 counts what they are
in terms of latency per token.
Rules: ages are edges of bins. Must not know: where a distribution comes from, queues.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastserve.core.lengths import EDGES, bin_of

LONGEST = 2**62  # more tokens than there are
NEGLIGIBLE = 2.0**-600  # a probability of going on, below which sums would lose their digits


class AnswerLength:
    """The distribution of one answer's length, prepared for questions.

    What lies above `max_tokens` ends there. Sums are kept from each bin to the end: probability,
    expected tokens, worth.
    """

    __slots__ = ("_beyond", "_longer", "_tokens", "_worth", "num_bins")

    def __init__(
        self,
        shares: Sequence[float],
        max_tokens: int | None = None,
        *,
        mean_tokens: float = 1.0,
        exponent: float = 0.0,
    ) -> None:
        """Take the probability of each bin; worth is (tokens / mean_tokens) ** -exponent."""
        last = len(shares) - 1 if max_tokens is None else min(bin_of(max_tokens), len(shares) - 1)
        self.num_bins = num_bins = last + 1
        self._longer = longer = [0.0] * (num_bins + 1)
        self._tokens = tokens = [0.0] * (num_bins + 1)
        self._worth = worths = [0.0] * (num_bins + 1)
        # For a stop at the beginning of bin k: P(longer) · EDGES[k] − E[tokens of the longer].
        self._beyond = beyond = [0.0] * (num_bins + 1)
        probability = expected = worth = 0.0
        for k in range(last, -1, -1):
            share = shares[k]
            if k < last:
                middle = (EDGES[k] + EDGES[k + 1] - 1) / 2
            else:
                share = math.fsum(shares[k:])
                middle = float(max_tokens or EDGES[k])
            probability += share
            expected += share * middle
            worth += share * (middle / mean_tokens) ** -exponent
            longer[k], tokens[k], worths[k] = probability, expected, worth
            beyond[k] = EDGES[k] * probability - expected

    def bin_at(self, num_tokens: int) -> int:
        """Return the bin that an answer is in of which so many tokens are out."""
        return min(bin_of(num_tokens + 1), self.num_bins - 1)

    def end_of(self, index: int) -> int:
        """Return how many tokens are out when the answer enters the next bin."""
        return EDGES[index + 1] - 1 if index + 1 < self.num_bins else LONGEST

    def tokens_left(self, index: int) -> float:
        """Return the expected number of tokens still to come at the beginning of a bin."""
        longer = self._longer[index]
        return self._tokens[index] / longer - EDGES[index] + 1 if longer > NEGLIGIBLE else 1.0

    def index(self, index: int, first_s: float, token_s: float) -> float:
        """Return the seconds of work for each answer of mean length, at the beginning of a bin."""
        longer, worth, beyond = self._longer, self._worth, self._beyond
        if longer[index] <= NEGLIGIBLE:
            return first_s + token_s
        start = EDGES[index] - 1
        # All times P(O > e), which stands in numerator and denominator.
        fixed = (first_s - token_s * start) * longer[index] + token_s * self._tokens[index]
        here, least = worth[index], math.inf
        for k in range(index + 1, self.num_bins + 1):
            gained = here - worth[k]
            if gained > 0.0:
                price = (fixed + token_s * (beyond[k] - longer[k])) / gained
                if price < least:
                    least = price
        return least if least < math.inf else first_s + token_s

    def share_below(self, num_tokens: int) -> float:
        """Return the probability of a shorter answer, half of the same bin's included."""
        index = min(bin_of(num_tokens), self.num_bins - 1)
        return 1.0 - (self._longer[index] + self._longer[index + 1]) / (2 * self._longer[0])
