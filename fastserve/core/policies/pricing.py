"""Pricing: what a request is expected to cost, and how far that moves it ahead of its arrival.

Prompts are known and answers are predicted by what those before them came to (`core/lengths.py`).
The price of a request is its Gittins index G in machine seconds (`core/gittins.py`), and it is
moved ahead by b(G) with b(x) = −ln(1 − e^(−γx)) / γ and 1/γ = κ · V (the γ-boost, arXiv
2404.08826), where V is the mean work in the system that an arrival finds: what FCFS would make it
wait. κ = 0 is FCFS, κ = ∞ the index alone.
Rules: equal questions have equal answers until the version of the outlook changes. One that has
begun counts less than its price. Must not know: who waits, orders, when a price is asked for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastserve.core.cost_model import CostModel
from fastserve.core.gittins import AnswerLength
from fastserve.core.lengths import EDGES, Labels, bin_of
from fastserve.core.outlook import Outlook
from fastserve.core.policies.kinds import Kind
from fastserve.core.request import Request

BEGUN_SHARE = 0.7  # of its price, for a request that has begun
NO_BOOST = 40.0  # prices in units of 1/γ from which on e^(−γx) is nothing beside 1
INDEX_ALONE = 1e6  # κ from which on arrivals decide between equal prices only
BINS_PER_PRICE = 2  # that an answer grows by before it is priced anew


class Price(NamedTuple):
    """The seconds expected of a request, and those that it goes ahead of its arrival by.

    It holds until the request has `next_num_tokens`, prompt included.
    """

    work_s: float
    boost_s: float
    next_num_tokens: int = 0


class Pricing:
    """Prices on one machine, as of the outlook, which may be shared by several policies."""

    def __init__(
        self,
        cost_model: CostModel,
        outlook: Outlook,
        *,
        boost: float,
        max_num_seqs: int,
        window: int,
        num_kv_tokens: int,
    ) -> None:
        """`boost` is κ; `window` is the longest request and `num_kv_tokens` what a device holds."""
        self._cost_model = cost_model
        self._outlook = outlook
        self._boost = min(boost, INDEX_ALONE)
        self._max_num_seqs = max_num_seqs
        self._window = window
        self._num_kv_tokens = num_kv_tokens

    def kind_of(self, request: Request, labels: Labels) -> Kind:
        """Return what a request that comes with these labels has in common with others."""
        limit = request.max_num_tokens
        return Kind(
            labels,
            EDGES[bin_of(limit - request.num_prompt_tokens)] if limit < self._window else None,
            _rounded(self._prefill_s(request)),
            _rounded(request.num_prompt_tokens),
        )

    def answer(self, kind: Kind) -> AnswerLength:
        """Return the distribution of the length of an answer."""
        return self._outlook.answer(kind.labels, kind.max_tokens)

    def of_waiting(self, kind: Kind) -> Price:
        """Return the price of a request of a kind that has not begun."""
        answer, token_s = self.answer(kind), self.token_s(kind)
        work_s = kind.prefill_s + token_s * answer.tokens_left(0)
        return Price(work_s, self._boost_s(answer.index(0, kind.prefill_s, token_s)))

    def of_begun(self, request: Request, kind: Kind) -> Price:
        """Return the price of a request that has."""
        answer = self.answer(kind)
        num_tokens = request.num_output_tokens
        index = answer.bin_at(num_tokens)
        prefill_s, token_s = self._prefill_s(request), self.token_s(kind)
        work_s = prefill_s + token_s * answer.tokens_left(index)
        # Each chunk of a prompt, and the first token, changes the price.
        next_num_tokens = 0
        if num_tokens:
            edge = answer.end_of(min(index + BINS_PER_PRICE, answer.num_bins) - 1)
            next_num_tokens = request.num_prompt_tokens + edge
        price_s = BEGUN_SHARE * answer.index(index, prefill_s, token_s)
        return Price(work_s, self._boost_s(price_s), next_num_tokens)

    def token_s(self, kind: Kind) -> float:
        """Return the machine seconds of a token of an answer, in the middle of a mean one."""
        outlook = self._outlook
        return self._cost_model.seat_token_s(
            kind.prompt_tokens + outlook.mean_tokens / 2,
            outlook.mean_prompt_tokens + outlook.mean_tokens / 2,
            num_seats=self._max_num_seqs,
            num_kv_tokens=self._num_kv_tokens,
        )

    @property
    def scale_s(self) -> float:
        """1/γ."""
        return self._boost * self._outlook.mean_work_s

    def _prefill_s(self, request: Request) -> float:
        """Return the machine seconds of the tokens before the next sample."""
        start = request.num_cached_tokens if request.table is None else request.num_computed_tokens
        num_tokens = request.num_tokens - start
        return self._cost_model.added_prefill_s(num_tokens, start) if num_tokens > 1 else 0.0

    def _boost_s(self, price_s: float) -> float:
        return boost_s(price_s, self.scale_s)


def boost_s(price_s: float, scale_s: float) -> float:
    """Return b(G) = −ln(1 − e^(−γG)) / γ, 1/γ = `scale_s`; 0 where that is 0."""
    if price_s >= NO_BOOST * scale_s:
        return 0.0
    return -scale_s * math.log(-math.expm1(-price_s / scale_s))


def _rounded(value: float) -> float:
    """Return a value rounded to a power of 2^¼; 0 as it is."""
    return 2.0 ** (round(4.0 * math.log2(value)) / 4.0) if value else 0.0
