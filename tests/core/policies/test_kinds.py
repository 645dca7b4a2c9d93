"""Lines of waiting requests: any order of joins, leaves and boosts against a naive sort."""

from __future__ import annotations

from itertools import islice
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastserve.core.policies.kinds import Kind, Line, Lines
from fastserve.core.request import Request
from tests.core.builders import make_request

KINDS = [Kind((f"p{n}",), None, float(n), float(n)) for n in range(4)]
times = st.integers(0, 12).map(float)  # few, so that keys are often equal


def waiting(handle: int, arrived_at: float) -> Request:
    """Return a request that came when it says."""
    request = make_request(handle)
    request.arrived_at = arrived_at
    return request


class NaiveLine:
    """A line as a list, and its boost."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.boost_s = 0.0


def merged(lines: list[NaiveLine]) -> list[int]:
    """Return handles by (arrived_at - boost, handle) of the heads, line after line in its order.

    A line is first come, first served whatever the times of its requests say.
    """
    left = [(line.boost_s, sorted(line.requests, key=lambda r: r.handle)) for line in lines]
    order: list[int] = []
    while heads := [(rs[0].arrived_at - boost, rs[0].handle, rs) for boost, rs in left if rs]:
        order.append(min(heads)[2].pop(0).handle)
    return order


class LinesInAnyOrder(RuleBasedStateMachine):
    """Requests join and leave, lines are boosted; the order is that of a naive sort."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = Lines()
        self.naive = [NaiveLine() for _ in KINDS]
        self.line_of: dict[int, tuple[Line, int]] = {}
        self.away: list[Request] = []
        self.num_made = 0

    def enter(self, request: Request, number: int, boost_s: float) -> None:
        """Join as a policy does: a line that is new is boosted at once."""
        line = self.lines.line(KINDS[number])
        is_new = line is None
        if line is None:
            line = Line(KINDS[number])
        self.lines.join(line, request)
        if is_new:
            self.lines.boost(line, boost_s)
            self.naive[number].boost_s = boost_s
        self.naive[number].requests.append(request)
        self.line_of[request.handle] = (line, number)

    @rule(number=st.integers(0, 3), arrived_at=times, boost_s=times)
    def come(self, number: int, arrived_at: float, boost_s: float) -> None:
        """A request comes; one that crossed processes may say that it came before others."""
        self.enter(waiting(self.num_made, arrived_at), number, boost_s)
        self.num_made += 1

    @precondition(lambda self: self.line_of)
    @rule(data=st.data(), comes_back=st.booleans())
    def leave(self, data: st.DataObject, comes_back: bool) -> None:
        """One leaves from anywhere in its line."""
        handle = data.draw(st.sampled_from(sorted(self.line_of)))
        line, number = self.line_of.pop(handle)
        request = line.requests[handle]
        self.lines.leave(line, request)
        self.naive[number].requests.remove(request)
        if comes_back:
            self.away.append(request)

    @precondition(lambda self: self.away)
    @rule(number=st.integers(0, 3), boost_s=times)
    def come_back(self, number: int, boost_s: float) -> None:
        """One that was elsewhere takes the place of its handle, not the end."""
        self.enter(self.away.pop(), number, boost_s)

    @precondition(lambda self: self.line_of)
    @rule(data=st.data(), boost_s=times)
    def boost(self, data: st.DataObject, boost_s: float) -> None:
        """A line is given another boost."""
        line, number = self.line_of[data.draw(st.sampled_from(sorted(self.line_of)))]
        self.lines.boost(line, boost_s)
        self.naive[number].boost_s = boost_s

    @invariant()
    def is_in_order(self) -> None:
        """The whole order, its keys, and which lines there are."""
        keyed = list(self.lines)
        assert [handle for _, handle, _ in keyed] == merged(self.naive)
        for key, handle, request in keyed:
            line, number = self.line_of[handle]
            assert request.handle == handle
            assert key == self.lines.key(line, request)
            assert key == request.arrived_at - self.naive[number].boost_s
        assert {line.kind for line in self.lines.lines()} == {
            kind for kind, line in zip(KINDS, self.naive, strict=True) if line.requests
        }
        for kind, naive in zip(KINDS, self.naive, strict=True):
            found = self.lines.line(kind)
            assert (found is not None) == bool(naive.requests)


TestLinesInAnyOrder = pytest.mark.no_cover(LinesInAnyOrder.TestCase)


class Counting(Lines):
    """It counts the keys that it makes."""

    num_keys = 0

    def key(self, line: Line, request: Request) -> float:
        """Count."""
        self.num_keys += 1
        return super().key(line, request)


def test_to_read_the_head_of_ten_thousand_makes_few_keys() -> None:
    """A plan looks at some hundreds; neither they nor a boost cost a look at all that wait."""
    lines, rng = Counting(), Random(0)
    for handle in range(10_000):
        kind = Kind((f"p{rng.randrange(20)}",), None, 0.0, 0.0)
        lines.join(lines.line(kind) or Line(kind), waiting(handle, handle / 100))
    for number, line in enumerate(lines.lines()):
        lines.boost(line, number / 10)
    lines.num_keys = 0
    head = [handle for _, handle, _ in islice(lines, 200)]
    assert lines.num_keys < 300
    assert head == [handle for _, handle, _ in lines][:200]
    lines.num_keys = 0
    lines.boost(next(lines.lines()), 7.0)
    assert lines.num_keys == 1
