"""The clients: what each is owed, what it got, and whether its one end is a right one.

Rules: an answer is known before it is asked for, for the model is a function of (seed, position).
What a client has must at any moment be the beginning of that. It ends once; an end other than the
answer's own needs a fault that explains it. Must not know: engines, places, when faults happen.
"""

from __future__ import annotations

from enum import StrEnum

from fastserve.client.interfaces import EngineDeadError
from fastserve.client.streams import RequestStream
from fastserve.core.messages import RequestFailedError, RequestUpdate
from fastserve.core.request import FinishReason
from tests.dst.device import token
from tests.dst.scenario import EOS, Asked
from tests.dst.story import Story
from tests.fake_executor import prompt_score, undisturbed

DEATHS_TO_BLAME = 2


class End(StrEnum):
    """How a request can end."""

    ANSWERED = "answered"
    STOPPED = "stop string matched"
    LEFT = "client left"
    STEP_FAILED = "its step failed"
    BLAMED = "given up after deaths of engines"
    REFUSED = "refused: it can never run"
    NO_ENGINE = "no engine is left"


class BrokenPromiseError(AssertionError):
    """A request did not get what it is owed."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"request {number}: {what}")
        self.number = number


class Client:
    """One request, from its client's side."""

    def __init__(self, asked: Asked, stream: RequestStream, story: Story) -> None:
        params = asked.arrival.params
        self.asked = asked
        self.number = stream.number
        self.end: End | None = None
        self.num_deaths = 0  # of engines that had it, since its last token
        self.was_in_failed_step = False
        self.received: list[int] = []
        self._scores: list[tuple[float, int]] = []
        self._stream = stream
        self._story = story
        self._has_finished = False  # it has said that a stop string matched
        self._owed, self._reason, self._stop_reason = undisturbed(params, token, {EOS})
        prompt = asked.arrival.prompt_token_ids
        is_scored = params.prompt_logprobs is not None
        scores = [prompt_score(token_id, p)[:2] for p, token_id in enumerate(prompt) if p]
        self._owed_scores = scores if is_scored else []

    @property
    def num_owed(self) -> int:
        """How many tokens its whole answer has."""
        return len(self._owed)

    def read(self) -> None:
        """Take in all that has come, and act on it: leave, or say that a stop string matched."""
        while self.end is None:
            step = self._stream.__anext__()
            try:
                step.send(None)
            except StopIteration as news:
                self._take(news.value)
            except StopAsyncIteration:
                self._fail("its stream is over without a terminal update")
            except (EngineDeadError, RequestFailedError, ValueError) as error:
                self._take_error(error)
            else:
                step.close()  # nothing is there, and it would wait
                return

    def leave(self) -> None:
        """Give the request up."""
        if self.end is None:
            self._stream.abort()
            self._close(End.LEFT)

    def check(self, condition: bool, what: str) -> None:
        """Raise BrokenPromiseError unless a promise is kept."""
        if not condition:
            self._fail(what)

    def _fail(self, what: str) -> None:
        raise BrokenPromiseError(self.number, what)

    def _take(self, update: RequestUpdate) -> None:
        ids = [sample.token_id for sample in update.samples]
        self.received += ids
        self._scores += [(score.logprob, score.rank) for score in update.prompt_logprobs]
        if ids:
            self.num_deaths = 0
            self._story.tell(f"reads {ids}", self.number)
        num, num_scores = len(self.received), len(self._scores)
        self.check(self.received == self._owed[:num], f"{self.received} is not of {self._owed}")
        self.check(self._scores == self._owed_scores[:num_scores], "wrong scores of its prompt")
        if update.finish_reason is not None:
            self._take_end(update)
            return
        self.check(bool(ids or update.prompt_logprobs), "an update without news")
        if num >= self.asked.leaves_after:
            self.leave()
        elif num >= self.asked.stops_after and not self._has_finished:
            self._has_finished = True
            self._story.tell(f"stops after {num}", self.number)
            self._stream.finish(num)

    def _take_end(self, update: RequestUpdate) -> None:
        reason = update.finish_reason
        if reason is FinishReason.ERROR:
            self.check(self.was_in_failed_step, f"an error that is nobody's: {update.error}")
            self._close(End.STEP_FAILED)
            return
        has_all = self.received == self._owed and self._scores == self._owed_scores
        if has_all and (reason, update.stop_reason) == (self._reason, self._stop_reason):
            self.check(not self.asked.is_poison, "what no engine can compute was computed")
            self._close(End.ANSWERED)
            return
        is_stopped = self._has_finished and reason is FinishReason.STOP
        self.check(is_stopped, f"ended with {reason}, {len(self.received)} of {self.num_owed} ids")
        self._close(End.STOPPED)

    def _take_error(self, error: Exception) -> None:
        if isinstance(error, EngineDeadError):
            self._close(End.NO_ENGINE)
        elif isinstance(error, RequestFailedError):
            self.check(self.num_deaths >= DEATHS_TO_BLAME, f"blamed without a reason: {error}")
            self._close(End.BLAMED)
        else:
            self.check(self.asked.is_refused, f"refused: {error}")
            self._close(End.REFUSED)

    def _close(self, end: End) -> None:
        self.end = end
        self._story.tell(f"ends: {end}", self.number)
