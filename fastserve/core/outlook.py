"""What is expected of requests, shared by all that order them: answers, and the work in the system.

Rules: what has been learned takes effect at once for all, when it has changed by enough: then the
`version` counts up, and whoever keeps something made from it makes that anew. In between, equal
questions have equal answers, but for those that MAX_ANSWERS others have been asked after.
Must not know: requests, orders.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from fastserve.core.gittins import AnswerLength
from fastserve.core.lengths import HALF_LIFE, SHRINKAGE, Labels, LengthModel
from fastserve.core.messages import Forecasts

ARRIVALS = 64  # that the mean work in the system is taken over
MAX_DRIFT = 0.1  # of that mean, before the version counts up
MIN_NEWS = 0.05  # answers since then over those that are remembered
MAX_ANSWERS = 4096  # distributions that are kept, those asked for last: of clients who hang up too
NUM_DECILES = 10

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Recent(Generic[Key, Value]):
    """The values that were asked for last, MAX_ANSWERS at most."""

    def __init__(self) -> None:
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> Value | None:
        """Return a value as the one asked for last; None if it is not kept."""
        found = self._values.get(key)
        if found is not None:
            self._values.move_to_end(key)
        return found

    def put(self, key: Key, value: Value) -> None:
        """Keep a new value, in place of the one that was asked for longest ago."""
        if len(self._values) == MAX_ANSWERS:
            self._values.popitem(last=False)
        self._values[key] = value

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()


class Outlook:
    """A LengthModel beside the mean work in the system, as of the latest version of both."""

    def __init__(self, model: LengthModel, latency_objective: float) -> None:
        """`latency_objective` is β, which takes effect as answers become known."""
        self.model = model
        self.version = 0
        self.mean_work_s = 0.0  # V, as of the version
        self.mean_tokens = model.mean_tokens  # of an answer
        self.mean_prompt_tokens = 0.0
        self._latency_objective = latency_objective
        self.num_made = 0  # distributions, which cost some time each
        self._num_ended = model.num_ended
        self._answers: _Recent[tuple[Labels, int | None], AnswerLength] = _Recent()
        self._distributions: _Recent[Labels, list[float]] = _Recent()
        self._num_arrivals = 0
        self._work_s = 0.0
        self._moving_work_s = 0.0
        self._moving_prompt_tokens = 0.0
        self._num_by_decile = [0] * NUM_DECILES
        self._predicted_tokens = 0.0
        self._answered_tokens = 0

    def arrived(self, num_prompt_tokens: int) -> None:
        """Note a request, which finds the work that is expected now."""
        self._num_arrivals += 1
        share = 1.0 / min(self._num_arrivals, ARRIVALS)
        self._moving_work_s += share * (self._work_s - self._moving_work_s)
        self._moving_prompt_tokens += share * (num_prompt_tokens - self._moving_prompt_tokens)

    def expect(self, work_s: float) -> None:
        """Note so much more work in the system, in machine seconds; less if negative."""
        self._work_s += work_s

    def ended(self, labels: Labels, num_tokens: int, predicted: AnswerLength) -> None:
        """Learn the length of an answer, and how well it was predicted."""
        decile = min(int(predicted.share_below(num_tokens) * NUM_DECILES), NUM_DECILES - 1)
        self._num_by_decile[decile] += 1
        self._predicted_tokens += predicted.tokens_left(0)
        self._answered_tokens += num_tokens
        self.model.add(labels, num_tokens)

    def answer(self, labels: Labels, max_tokens: int | None) -> AnswerLength:
        """Return the distribution of the length of an answer."""
        found = self._answers.get((labels, max_tokens))
        if found is None:
            self.num_made += 1
            # Of few answers one cannot tell which will be short.
            evidence = self._num_ended / (self._num_ended + SHRINKAGE)
            found = AnswerLength(
                self._distribution(labels),
                max_tokens,
                mean_tokens=self.mean_tokens,
                exponent=self._latency_objective * evidence,
            )
            self._answers.put((labels, max_tokens), found)
        return found

    @property
    def num_answers(self) -> int:
        """How many distributions are kept."""
        return len(self._answers)

    @property
    def is_due(self) -> bool:
        """Whether enough has changed since the version for another."""
        num_new = self.model.num_ended - self._num_ended
        if num_new > MIN_NEWS * min(self._num_ended, HALF_LIFE):
            return True
        return abs(self._moving_work_s - self.mean_work_s) > MAX_DRIFT * self.mean_work_s

    def renew(self) -> None:
        """Begin another version."""
        self.version += 1
        self.mean_work_s = self._moving_work_s
        self.mean_tokens = self.model.mean_tokens
        self.mean_prompt_tokens = self._moving_prompt_tokens
        self._num_ended = self.model.num_ended
        self._answers.clear()
        self._distributions.clear()

    def _distribution(self, labels: Labels) -> list[float]:
        """Return `model.distribution(labels)`; chains that begin alike share it."""
        found = self._distributions.get(labels)
        if found is None:
            if labels:
                found = self.model.refined(self._distribution(labels[:-1]), labels[-1])
            else:
                found = self.model.common_distribution()
            self._distributions.put(labels, found)
        return found

    def forecasts(self) -> Forecasts:
        """Return a snapshot for people."""
        return Forecasts(
            num_by_decile=tuple(self._num_by_decile),
            predicted_tokens=self._predicted_tokens,
            answered_tokens=self._answered_tokens,
            work_s=max(self._work_s, 0.0),
            mean_work_s=self._moving_work_s,
        )
