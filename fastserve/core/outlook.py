"""What is expected of requests, shared by all that order them: answers, and the work in the system.

Rules: what has been learned takes effect at once for all, when it has changed by enough: then the
`version` counts up, and whoever keeps something made from it makes that anew. In between, equal
questions have equal answers, but for those that were dropped for new ones to be kept.
Must not know: requests, orders.
"""

from __future__ import annotations

from fastserve.core.gittins import AnswerLength
from fastserve.core.lengths import HALF_LIFE, SHRINKAGE, Labels, LengthModel
from fastserve.core.messages import Forecasts

ARRIVALS = 64  # that the mean work in the system is taken over
MAX_DRIFT = 0.1  # of that mean, before the version counts up
MIN_NEWS = 0.05  # answers since then over those that are remembered
MAX_ANSWERS = 4096  # distributions that are kept: who asks and hangs up ends no answer
NUM_DECILES = 10


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
        self._answers: dict[tuple[Labels, int | None], AnswerLength] = {}
        self._distributions: dict[Labels, list[float]] = {}
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
            if len(self._answers) == MAX_ANSWERS:
                self._drop_answers()
            self.num_made += 1
            # Of few answers one cannot tell which will be short.
            evidence = self._num_ended / (self._num_ended + SHRINKAGE)
            found = self._answers[labels, max_tokens] = AnswerLength(
                self._distribution(labels),
                max_tokens,
                mean_tokens=self.mean_tokens,
                exponent=self._latency_objective * evidence,
            )
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
        self._drop_answers()

    def _drop_answers(self) -> None:
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
            self._distributions[labels] = found
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
