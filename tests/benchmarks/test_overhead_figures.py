"""The figures of an offline engine and of a live server that take turns."""

from __future__ import annotations

import pytest

from benchmarks.overhead_figures import (
    SPEEDS,
    Round,
    decode_speed,
    pieces_per_token,
    ratios,
    run_rounds,
    summary,
)
from fastserve.bench.stream_client import Answer
from fastserve.settings.option import ConfigError


def round_of(offline: float, server: float) -> Round:
    """Return a round in which every speed of a side is the same."""
    return Round(dict.fromkeys(SPEEDS, offline), dict.fromkeys(SPEEDS, server))


def test_decoding_counts_from_the_last_first_piece():
    """What came before every stream had begun is left out, as in `bench offline`."""
    early = Answer(0.0, [1.0, 2.0, 3.0, 4.0], output_tokens=4)
    late = Answer(0.0, [2.0, 3.0, 4.0, 6.0], output_tokens=4)
    assert decode_speed([early, late]) == pytest.approx(5 / 4)


def test_merged_pieces_count_as_the_tokens_they_stand_for():
    """A piece is worth the mean number of tokens of all pieces."""
    answers = [Answer(0.0, [1.0, 2.0, 3.0], output_tokens=6)]
    assert pieces_per_token(answers) == 0.5
    assert decode_speed(answers) == pytest.approx(2 * 2 / 2)


def test_one_piece_is_no_decoding():
    """Answers that came at once have no speed, and the flag that would help is named."""
    with pytest.raises(ConfigError, match="--output-len"):
        decode_speed([Answer(0.0, [1.0], output_tokens=2)])


def test_sides_take_turns_and_each_begins_as_often():
    """Rounds after the warm-up run offline, server, server, offline, with prompts of their own."""
    calls: list[str] = []

    def offline() -> dict[str, float]:
        calls.append("offline")
        return {"side": 0.0}

    def server(number: int) -> dict[str, float]:
        calls.append(f"server {number}")
        return {"side": 1.0}

    rounds = list(run_rounds(2, offline, server))
    assert calls == ["server 0", "offline", "offline", "server 1", "server 2", "offline"]
    assert rounds == [Round({"side": 0.0}, {"side": 1.0})] * 3


def test_a_ratio_belongs_to_a_round():
    """A machine that halves its speed between rounds leaves the median ratio alone."""
    rounds = [round_of(100.0, 90.0), round_of(50.0, 45.0), round_of(80.0, 40.0)]
    assert ratios(rounds[2]) == pytest.approx(dict.fromkeys(SPEEDS, 0.5))
    medians = summary(rounds)
    assert medians["ratios"] == pytest.approx(dict.fromkeys(SPEEDS, 0.9))
    assert medians["offline"] == dict.fromkeys(SPEEDS, 80.0)
    assert medians["server"] == dict.fromkeys(SPEEDS, 45.0)
