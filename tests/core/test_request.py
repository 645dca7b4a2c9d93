"""Requests: their counters, their ids, and the parameters they refuse."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.request import Arrival, Handle, Request, SamplingParams


def make_request(num_prompt: int = 5, max_output_tokens: int = 4, **kw: Any) -> Request:
    """Return a request with the prompt 100, 101, …."""
    prompt = range(100, 100 + num_prompt)
    arrival = Arrival(prompt, SamplingParams(), **kw)
    return Request(Handle(0), arrival, max_output_tokens=max_output_tokens)


@pytest.mark.parametrize(("start", "stop"), [(a, b) for a in range(9) for b in range(a, 9)])
def test_token_ids_are_one_sequence(start: int, stop: int) -> None:
    """Prompt and output read like one list, shorter where ids are not known yet."""
    request = make_request(output_token_ids=(1, 2))
    everything = [100, 101, 102, 103, 104, 1, 2]
    assert list(request.token_ids(start, stop)) == everything[start:stop]


def test_an_earlier_life_counts() -> None:
    """Ids of an earlier life are known, not computed, and count as output."""
    request = make_request(output_token_ids=(1, 2))
    assert (request.num_tokens, request.num_output_tokens) == (7, 2)
    assert request.num_unscheduled_tokens == 7
    request.append(3)
    assert not request.is_at_length_limit
    request.num_pending_samples = 1
    assert request.is_at_length_limit


def test_restart_forgets_kv_and_keeps_ids() -> None:
    """A new epoch starts from nothing computed, and is protected until it is past the old one."""
    request = make_request(output_token_ids=(1, 2))
    request.num_computed_tokens = request.num_scheduled_tokens = request.max_computed_tokens = 6
    request.num_pending_samples = 1
    request.restart()
    assert (request.epoch, request.num_tokens, request.num_unscheduled_tokens) == (1, 7, 7)
    assert request.is_recomputing
    request.num_computed_tokens = 6
    assert request.is_recomputing
    request.num_computed_tokens = 7
    assert not request.is_recomputing


def test_hashes_do_not_depend_on_how_ids_are_held() -> None:
    """Range, tuple and list with equal ids, prompt or output, hash alike."""
    params = SamplingParams()
    holders: list[Any] = [range(8), tuple(range(8)), list(range(8))]
    requests = [Request(Handle(0), Arrival(ids, params), max_output_tokens=4) for ids in holders]
    requests.append(
        Request(
            Handle(0),
            Arrival(range(3), params, output_token_ids=[3, 4, 5, 6, 7]),
            max_output_tokens=9,
        )
    )
    assert len({request.block_hash(1, 4) for request in requests}) == 1
    assert requests[0].block_hash(0, 4) != requests[0].block_hash(1, 4)


def test_hashes_of_a_workload_are_believed() -> None:
    """Hashes that come with the request are used as they are."""
    request = make_request(block_hashes=[b"a", b"b"])
    assert request.block_hash(1, 4) == b"b"


def chain(ids: Sequence[int], salt: str, block_size: int) -> list[bytes]:
    """Return the hashes of all full blocks of a prompt."""
    arrival = Arrival(ids, SamplingParams(), cache_salt=salt)
    request = Request(Handle(0), arrival, max_output_tokens=1)
    return [request.block_hash(index, block_size) for index in range(len(ids) // block_size)]


def test_without_a_salt_a_chain_begins_with_its_ids() -> None:
    """Hashes that a length file has learned of go on meaning the same prompts."""
    first = hashlib.sha256(array("q", range(4)).tobytes()).digest()
    second = hashlib.sha256(first + array("q", range(4, 8)).tobytes()).digest()
    assert chain(range(8), "", 4) == [first, second]


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=24),
    st.lists(st.text("ab\0", max_size=3), min_size=2, max_size=4, unique=True),
    st.integers(1, 4),
)
def test_chains_of_different_salts_never_meet(
    ids: list[int], salts: list[str], block_size: int
) -> None:
    """Equal ids, no equal hash; the same salt, the same hashes."""
    chains = [chain(ids, salt, block_size) for salt in salts]
    hashes = [item for one in chains for item in one]
    assert len(hashes) == len(salts) * (len(ids) // block_size)
    assert len(set(hashes)) == len(hashes)
    assert [chain(ids, salt, block_size) for salt in salts] == chains


def test_a_salt_that_spells_a_block_is_not_taken_for_it() -> None:
    """Or its requests would find the KV of what others say behind that block."""
    spelt = array("q", range(97, 101)).tobytes().decode()
    plain = chain([*range(97, 101), *range(8)], "", 4)
    assert not set(plain) & set(chain(range(8), spelt, 4))


def test_hashes_of_a_workload_are_salted_too() -> None:
    """What ids do not tell apart, salts do."""
    plain, *salted = (
        make_request(block_hashes=[b"a", b"b"], cache_salt=salt).block_hashes
        for salt in ("", "x", "y", "x")
    )
    assert plain == [b"a", b"b"]
    assert salted[0] == salted[2]
    assert len({*plain, *salted[0], *salted[1]}) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),  # beyond what a logit can be multiplied with
        ("repetition_penalty", 1e300),
        ("seed", 2**63),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logit_bias", {3: 101.0}),
        ("stop", ""),
        ("stop", ["a", ""]),
    ],
)
def test_bad_parameters_are_named(name: str, value: Any) -> None:
    """A value that no sampler can honour is refused, by name."""
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_good_parameters() -> None:
    """The edges of every range are inside."""
    params = SamplingParams(temperature=0.0, top_k=-1, min_tokens=16, max_tokens=16, stop="x")
    assert params.is_greedy
    assert params.stop_strings == ("x",)
    assert SamplingParams(stop=["a", "b"], max_tokens=None, min_tokens=99).stop_strings == (
        "a",
        "b",
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.7},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 1},
        {"logprobs": 0},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_what_asks_for_more_than_the_likeliest_ids_is_not_plain(asked: dict[str, Any]) -> None:
    """Filters and seeds change nothing of it, for they are about what is drawn at random."""
    greedy = SamplingParams(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1, seed=1)
    assert greedy.is_plain
    assert not dataclasses.replace(greedy, **asked).is_plain


def test_an_arrival_cannot_be_changed_from_outside() -> None:
    """Lists are copied; a tuple and a range are kept as they are."""
    prompt, known, hashes = [1, 2], [3], [b"h"]
    arrival = Arrival(prompt, SamplingParams(), output_token_ids=known, block_hashes=hashes)
    for changed in (prompt, known, hashes):
        changed.clear()
    assert arrival.prompt_token_ids == (1, 2)
    assert arrival.output_token_ids == (3,)
    assert arrival.block_hashes == (b"h",)
    ids = range(9)
    assert Arrival(ids, SamplingParams()).prompt_token_ids is ids
