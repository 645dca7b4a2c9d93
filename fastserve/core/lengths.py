"""How long answers are: what those that have ended say about the next one.

Histograms over geometric bins (ratio 2^¼) of the lengths of all answers that have ended, one per
label; a label is something that is known of a request before it is answered: the length of its
prompt, who sent it, how it begins. Each histogram is shrunk towards that of the label before it,
the first towards an exponential distribution with the running mean, so a label that was seen
rarely says little:  p ← (h + k · p) / (n + k).
Rules: an answer counts as long as it became, whatever ended it, for that was its size to a queue.
The past is forgotten exponentially, counted in answers. The number of labels of a kind is bounded.
Must not know: what is done with a distribution, requests that have not ended, time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastserve.core.request import Request

FORMAT = 1  # of `state`; another number where a reader of this one would go wrong
HALF_LIFE = 2000  # answers, after which one counts half
SHRINKAGE = 8.0  # k: answers that outweigh what the label before says
PRIOR_TOKENS = 256.0  # the mean before the first answer, which counts as `SHRINKAGE` answers
MAX_LABELS = 1024  # of one kind; that seen least recently goes
MAX_CLIENT = 64  # characters of its name that tell a client from others
MAX_TOKENS = 2**20  # the longest answer that has a bin of its own
MAX_WEIGHT = 2.0**512  # of one answer, before all are scaled down

BEGINNING = "b"
Labels = tuple[str, ...]
"""From the general to the particular. A label is its kind, one character, and its value."""


def _make_edges() -> Iterator[int]:
    edge = 1
    for quarter in range(4 * MAX_TOKENS.bit_length()):
        if edge <= round(2 ** (quarter / 4)):
            edge = round(2 ** (quarter / 4))
            yield edge
            edge += 1


EDGES = tuple(_make_edges())
"""Bin i holds the lengths in [EDGES[i], EDGES[i + 1]); the last one all that are longer."""
NUM_BINS = len(EDGES)


def bin_of(num_tokens: int) -> int:
    """Return the bin of a length of at least 1."""
    return bisect_right(EDGES, num_tokens) - 1


def labels_of(request: Request, window: int, block_size: int) -> Labels:
    """Return what is known of a request that may tell the length of its answer.

    The length of its prompt by half-octaves; its limit where it set one below the `window`; its
    client; its first block of ids, which is its system prompt's or its template's.
    """
    num_tokens = request.num_prompt_tokens
    labels = [f"p{round(2 * math.log2(num_tokens))}"]
    if request.max_num_tokens < window:
        labels.append(f"m{bin_of(request.max_num_tokens - num_tokens)}")
    if request.client:
        labels.append(f"c{request.client[:MAX_CLIENT]}")
    if num_tokens >= block_size:
        labels.append(f"{BEGINNING}{request.block_hash(0, block_size).hex()}")
    return tuple(labels)


class Histogram:
    """Weights by bin, and their sum."""

    __slots__ = ("total", "weights")

    def __init__(self, weights: Mapping[int, float] | None = None) -> None:
        self.weights = dict(weights or {})
        self.total = math.fsum(self.weights.values())

    def add(self, index: int, weight: float) -> None:
        """Count one length."""
        self.weights[index] = self.weights.get(index, 0.0) + weight
        self.total += weight

    def scale(self, factor: float) -> None:
        """Multiply all weights."""
        self.weights = {index: weight * factor for index, weight in self.weights.items()}
        self.total *= factor


class LengthModel:
    """What is known of answer lengths, by label. `num_ended` answers were taken in."""

    def __init__(self, half_life: float = HALF_LIFE, shrinkage: float = SHRINKAGE) -> None:
        """Take in how many answers one counts half, and how many outweigh a coarser label."""
        self.num_ended = 0
        self._growth = 2.0 ** (1.0 / half_life)
        self._shrinkage = shrinkage
        # The weight of the latest answer: the past shrinks beside it without being touched.
        self._weight = 1.0
        self._all = Histogram()
        self._sum = 0.0
        self._kinds: dict[str, dict[str, Histogram]] = {}

    @property
    def num_remembered(self) -> float:
        """How many answers the past still counts as."""
        return self._all.total / self._weight

    @property
    def mean_tokens(self) -> float:
        """The mean length, of which the prior is a part."""
        prior = self._shrinkage * PRIOR_TOKENS
        return (self._sum / self._weight + prior) / (self.num_remembered + self._shrinkage)

    def telling(self, labels: Labels) -> Labels:
        """Return the labels without beginnings that no answer has been seen to: most never come
        twice, and those that do will be known in time.
        """
        seen = self._kinds.get(BEGINNING, {})
        return tuple(label for label in labels if label[0] != BEGINNING or label in seen)

    def distribution(self, labels: Labels) -> list[float]:
        """Return the probability of each bin for a request with these labels."""
        shares = self.common_distribution()
        for label in labels:
            shares = self.refined(shares, label)
        return shares

    def common_distribution(self) -> list[float]:
        """Return the probability of each bin for a request without labels."""
        mean = self.mean_tokens
        longer = [math.exp((1 - edge) / mean) for edge in EDGES]
        shares = [here - after for here, after in zip(longer, [*longer[1:], 0.0], strict=True)]
        return self._shrunk(self._all, shares)

    def refined(self, shares: list[float], label: str) -> list[float]:
        """Return what a distribution becomes by one more label."""
        histogram = self._kinds.get(label[0], {}).get(label)
        return shares if histogram is None else self._shrunk(histogram, shares)

    def add(self, labels: Labels, num_tokens: int) -> None:
        """Take in an answer that has ended with so many tokens, at least 1."""
        self.num_ended += 1
        self._weight *= self._growth
        if self._weight > MAX_WEIGHT:
            self._scale(1.0 / self._weight)
        weight, index = self._weight, bin_of(num_tokens)
        self._all.add(index, weight)
        self._sum += weight * num_tokens
        for label in labels:
            seen = self._kinds.setdefault(label[0], {})
            histogram = seen.pop(label, None) or Histogram()
            histogram.add(index, weight)
            seen[label] = histogram  # as the one seen most recently
            if len(seen) > MAX_LABELS:
                del seen[next(iter(seen))]

    def state(self) -> dict[str, Any]:
        """Return everything as plain values of JSON, for `restored`."""
        labels = {
            label: _plain(histogram, self._weight)
            for seen in self._kinds.values()
            for label, histogram in seen.items()
        }
        return {
            "format": FORMAT,
            "num_ended": self.num_ended,
            "sum": self._sum / self._weight,
            "all": _plain(self._all, self._weight),
            "labels": labels,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> LengthModel:
        """Return a model as it was when `state` was taken.

        Raises ValueError, LookupError or TypeError for what is no such state.
        """
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r} is not {FORMAT}")
        try:
            return cls._read(state)
        except (ArithmeticError, AttributeError) as error:  # of inf, of what has no items
            raise ValueError(f"a value has another type or size: {error}") from error

    @classmethod
    def _read(cls, state: Mapping[str, Any]) -> LengthModel:
        model = cls()
        model.num_ended = int(state["num_ended"])
        model._sum = float(state["sum"])
        model._all = _histogram(state["all"])
        for label, weights in state["labels"].items():
            seen = model._kinds.setdefault(label[0], {})
            seen[label] = _histogram(weights)
            if len(seen) > MAX_LABELS:
                raise ValueError("there are too many labels of a kind")
        if not math.isfinite(model._sum) or model._sum < 0.0 or model.num_ended < 0:
            raise ValueError("a sum of lengths cannot be negative")
        return model

    def _shrunk(self, histogram: Histogram, shares: list[float]) -> list[float]:
        """Return (h + k · p) / (n + k)."""
        per_answer = 1.0 / (histogram.total / self._weight + self._shrinkage)
        kept = self._shrinkage * per_answer
        shrunk = [share * kept for share in shares]
        per_weight = per_answer / self._weight
        for index, weight in histogram.weights.items():
            shrunk[index] += weight * per_weight
        return shrunk

    def _scale(self, factor: float) -> None:
        self._weight *= factor
        self._sum *= factor
        self._all.scale(factor)
        for seen in self._kinds.values():
            for histogram in seen.values():
                histogram.scale(factor)


def _plain(histogram: Histogram, unit: float) -> list[list[float]]:
    return [[index, weight / unit] for index, weight in sorted(histogram.weights.items())]


def _histogram(weights: Sequence[Sequence[Any]]) -> Histogram:
    read = {int(index): float(weight) for index, weight in weights}
    if not all(0 <= index < NUM_BINS and 0.0 <= read[index] < math.inf for index in read):
        raise ValueError("a histogram has a bin or a weight that cannot be")
    return Histogram(read)
