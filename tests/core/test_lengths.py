"""Answer lengths: bins, shrinkage and forgetting by hand, bounds, and a state that goes on."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fastserve.core import lengths
from fastserve.core.lengths import (
    BEGINNING,
    EDGES,
    MAX_CLIENT,
    MAX_LABELS,
    MAX_TOKENS,
    NUM_BINS,
    PRIOR_TOKENS,
    SHRINKAGE,
    LengthModel,
    bin_of,
    labels_of,
)
from fastserve.core.request import Arrival, Handle, Request, SamplingParams

WINDOW, BLOCK_SIZE = 1000, 4
answers = st.lists(st.tuples(st.sampled_from(("pa", "pb", "cx", "cy")), st.integers(1, 5000)))


def asked(num_prompt: int = 8, max_tokens: int = 16, **kw: Any) -> Request:
    """Return a request; `kw` are fields of its Arrival."""
    arrival = Arrival(range(num_prompt), SamplingParams(), **kw)
    return Request(Handle(0), arrival, max_output_tokens=max_tokens)


def exponential(mean: float) -> list[float]:
    """Return what falls into each bin of lengths whose excess over 1 is exponential."""
    ends = [*EDGES[1:], math.inf]
    return [
        math.exp((1 - edge) / mean) - math.exp((1 - end) / mean)
        for edge, end in zip(EDGES, ends, strict=True)
    ]


# ── bins ─────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 2 * MAX_TOKENS))
def test_every_length_is_in_exactly_one_bin(num_tokens: int) -> None:
    """No length falls between two bins or beyond the last one."""
    index = bin_of(num_tokens)
    assert EDGES[index] <= num_tokens
    assert index == NUM_BINS - 1 or num_tokens < EDGES[index + 1]


def test_edges_grow_by_a_fixed_ratio() -> None:
    """From 1, each a whole number nearest to a power of 2^¼, without a gap or an empty bin."""
    assert EDGES[0] == 1
    assert EDGES[-1] >= MAX_TOKENS
    assert all(low < high for low, high in pairwise(EDGES))
    powers = {round(2 ** (quarter / 4)) for quarter in range(4 * MAX_TOKENS.bit_length())}
    assert set(EDGES) == powers


# ── labels ───────────────────────────────────────────────────────────────────────────────────


def test_a_label_says_what_is_known_before_the_answer() -> None:
    """Prompts of one half-octave are alike; a limit, a client and a beginning count when given."""
    bare = asked(2, WINDOW - 2)
    assert len(labels_of(bare, WINDOW, BLOCK_SIZE)) == 1
    assert labels_of(asked(64), WINDOW, 512) == labels_of(asked(65), WINDOW, 512)
    assert labels_of(asked(64), WINDOW, 512)[0] != labels_of(asked(128), WINDOW, 512)[0]
    limited = asked(2, 16)
    assert labels_of(limited, WINDOW, BLOCK_SIZE)[1:] != labels_of(bare, WINDOW, BLOCK_SIZE)[1:]
    named = asked(2, WINDOW - 2, client="ann")
    assert labels_of(named, WINDOW, BLOCK_SIZE)[1:] == ("cann",)
    lengthy = labels_of(asked(2, WINDOW - 2, client="x" * 10_000), WINDOW, BLOCK_SIZE)
    assert lengthy[1:] == ("c" + "x" * MAX_CLIENT,)  # labels are kept, in memory and in a file
    begun, as_well = asked(4, WINDOW - 4), asked(5, WINDOW - 5)
    assert labels_of(begun, WINDOW, BLOCK_SIZE)[-1][0] == BEGINNING
    assert labels_of(begun, WINDOW, BLOCK_SIZE)[-1] == labels_of(as_well, WINDOW, BLOCK_SIZE)[-1]


def test_a_beginning_tells_nothing_until_an_answer_to_it_has_ended() -> None:
    """Requests whose beginnings never came before are of one kind; other labels always tell."""
    model = LengthModel()
    assert model.telling(("p1", "cx", "b01")) == ("p1", "cx")
    model.add(("p1", "b01"), 5)
    assert model.telling(("p1", "cx", "b01")) == ("p1", "cx", "b01")
    assert model.telling(("p1", "b02")) == ("p1",)


# ── distributions ────────────────────────────────────────────────────────────────────────────


def test_before_the_first_answer_lengths_are_exponential() -> None:
    """The prior, for whatever label."""
    assert LengthModel().distribution(()) == pytest.approx(exponential(PRIOR_TOKENS))
    assert LengthModel().distribution(("pa", "cx")) == LengthModel().distribution(())


def test_each_label_is_shrunk_towards_the_one_before_it() -> None:
    """Three answers, two labels, by hand: (h + k · p) / (n + k) from the general to the particular.

    Without forgetting the counts are whole: all 3, `pa` 2 of them, `cx` 1.
    """
    k = 2.0
    model = LengthModel(half_life=math.inf, shrinkage=k)
    model.add(("pa", "cx"), 10)
    model.add(("pa",), 100)
    model.add(("pb",), 1000)
    mean = (10 + 100 + 1000 + k * PRIOR_TOKENS) / (3 + k)
    assert model.mean_tokens == pytest.approx(mean)
    assert model.num_remembered == pytest.approx(3)
    ten, hundred, thousand = bin_of(10), bin_of(100), bin_of(1000)
    for index, prior in enumerate(exponential(mean)):
        of_all = ((index in (ten, hundred, thousand)) + k * prior) / (3 + k)
        of_prompt = ((index in (ten, hundred)) + k * of_all) / (2 + k)
        of_client = ((index == ten) + k * of_prompt) / (1 + k)
        assert model.distribution(())[index] == pytest.approx(of_all)
        assert model.distribution(("pa",))[index] == pytest.approx(of_prompt)
        assert model.distribution(("pa", "cx"))[index] == pytest.approx(of_client)
        assert model.distribution(("pz", "cx"))[index] == pytest.approx(
            ((index == ten) + k * of_all) / (1 + k)
        )


def test_after_a_half_life_an_answer_counts_half() -> None:
    """Half-life 2: of answers 4, 2 and 0 ends ago the first counts ¼, the second ½."""
    model = LengthModel(half_life=2.0, shrinkage=1.0)
    model.add(("pa",), 10)
    model.add((), 100)
    model.add(("pa",), 1000)
    model.add((), 100)
    model.add(("pa",), 100)
    root = 2**-0.5
    num_remembered = 0.25 + 0.5 * root + 0.5 + root + 1
    assert model.num_remembered == pytest.approx(num_remembered)
    total = 10 / 4 + 100 * 0.5 * root + 1000 / 2 + 100 * root + 100
    mean = (total + PRIOR_TOKENS) / (num_remembered + 1)
    assert model.mean_tokens == pytest.approx(mean)
    index, prior = bin_of(1000), exponential(mean)[bin_of(1000)]
    of_all = (0.5 + prior) / (num_remembered + 1)
    assert model.distribution(("pa",))[index] == pytest.approx((0.5 + of_all) / (1.75 + 1))


@given(answers)
def test_a_distribution_is_one(taken: list[tuple[str, int]]) -> None:
    """Probabilities are not negative and sum to 1, whatever was seen."""
    model = LengthModel()
    for label, num_tokens in taken:
        model.add((label,), num_tokens)
    for labels in ((), ("pa",), ("pa", "cx"), ("pz", "cy")):
        shares = model.distribution(labels)
        assert len(shares) == NUM_BINS
        assert min(shares) >= 0.0
        assert math.fsum(shares) == pytest.approx(1.0, abs=1e-12)


def test_scaling_down_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that would overflow are scaled, and every answer counts as it did."""
    grown, scaled = LengthModel(half_life=3.0), LengthModel(half_life=3.0)
    taken = [(f"p{n % 3}", 1 + n * 37 % 900) for n in range(100)]
    for label, num_tokens in taken:
        grown.add((label,), num_tokens)
    monkeypatch.setattr(lengths, "MAX_WEIGHT", 4.0)
    for label, num_tokens in taken:
        scaled.add((label,), num_tokens)
    assert scaled._weight <= 4.0 < grown._weight
    assert scaled.mean_tokens == pytest.approx(grown.mean_tokens)
    assert scaled.num_remembered == pytest.approx(grown.num_remembered)
    for label in ("p0", "p1", "p2"):
        assert scaled.distribution((label,)) == pytest.approx(grown.distribution((label,)))


def test_a_short_memory_never_overflows() -> None:
    """Weights double with every answer, and ten thousand of them stay finite."""
    model = LengthModel(half_life=1.0)
    for n in range(10_000):
        model.add(("pa",), 1 + n % 2)
    assert model.num_remembered == pytest.approx(2.0)
    assert math.fsum(model.distribution(("pa",))) == pytest.approx(1.0)


def test_of_a_kind_the_label_seen_least_recently_goes() -> None:
    """Labels are bounded kind by kind; one that comes again is kept."""
    model = LengthModel()
    model.add(("pa", "c0"), 7)
    for n in range(1, MAX_LABELS):
        model.add((f"c{n}",), 7)
    model.add(("c0",), 7)
    model.add(("cnew",), 7)
    labels = model.state()["labels"]
    assert sum(label[0] == "c" for label in labels) == MAX_LABELS
    assert "c1" not in labels
    assert {"c0", "c2", "cnew", "pa"} <= set(labels)
    assert model.distribution(("c1",)) == model.distribution(())


# ── state ────────────────────────────────────────────────────────────────────────────────────


@given(answers, answers)
def test_a_restored_model_goes_on_as_the_old_one(
    taken: list[tuple[str, int]], later: list[tuple[str, int]]
) -> None:
    """Through JSON and back: equal distributions, and equal ones after more answers."""
    model = LengthModel()
    for label, num_tokens in taken:
        model.add((label,), num_tokens)
    restored = LengthModel.restored(json.loads(json.dumps(model.state())))
    for label, num_tokens in [("pa", 1), *later]:
        assert restored.num_ended == model.num_ended
        assert restored.mean_tokens == pytest.approx(model.mean_tokens)
        assert restored.num_remembered == pytest.approx(model.num_remembered)
        for labels in ((), ("pa",), ("pb", "cy")):
            assert restored.distribution(labels) == pytest.approx(model.distribution(labels))
        model.add((label,), num_tokens)
        restored.add((label,), num_tokens)


def test_a_restored_model_forgets_the_same_label() -> None:
    """The order in which labels were seen is a part of the state."""
    model = LengthModel()
    for n in [*range(MAX_LABELS), 0]:
        model.add((f"c{n}",), 7)
    restored = LengthModel.restored(json.loads(json.dumps(model.state())))
    for either in (model, restored):
        either.add(("cnew",), 7)
        assert "c0" in either.state()["labels"]
        assert "c1" not in either.state()["labels"]


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 999},
        {"format": None},
        {"num_ended": -1},
        {"num_ended": None},
        {"num_ended": "many"},
        {"sum": -1.0},
        {"sum": math.nan},
        {"sum": math.inf},
        {"sum": None},
        {"all": None},
        {"all": [[0]]},
        {"all": [[NUM_BINS, 1.0]]},
        {"all": [[-1, 1.0]]},
        {"all": [[0, -1.0]]},
        {"all": [[0, math.nan]]},
        {"all": [[0, math.inf]]},
        {"labels": {"": [[0, 1.0]]}},
        {"labels": {"pa": [[0, -1.0]]}},
        {"labels": {"pa": 5}},
        {"num_ended": math.inf},
        {"all": [[math.inf, 1.0]]},
        {"all": [[0, 1e308], [1, 1e308]]},
        {"labels": []},
        {"labels": {f"c{n}": [] for n in range(MAX_LABELS + 1)}},
    ],
)
def test_what_is_no_state_is_refused(changes: dict[str, Any]) -> None:
    """A file that was damaged raises what the caller was told of, and begins no wrong model."""
    model = LengthModel()
    model.add(("pa",), 5)
    with pytest.raises((ValueError, LookupError, TypeError)):
        LengthModel.restored(model.state() | changes)


@pytest.mark.parametrize("field", ["format", "num_ended", "sum", "all", "labels"])
def test_a_state_that_lacks_something_is_refused(field: str) -> None:
    """No part of a state has a default."""
    state = LengthModel().state()
    del state[field]
    with pytest.raises(LookupError):
        LengthModel.restored(state)


def test_the_shrinkage_is_what_few_answers_count_against() -> None:
    """As many answers as the shrinkage have half the say."""
    model = LengthModel(half_life=math.inf)
    for _ in range(round(SHRINKAGE)):
        model.add((), 1)
    own = model.distribution(())[0] - exponential(model.mean_tokens)[0] / 2
    assert own == pytest.approx(round(SHRINKAGE) / (round(SHRINKAGE) + SHRINKAGE), rel=1e-6)
