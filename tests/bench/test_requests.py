"""What `bench serve` sends: lengths, ids, arrivals, and the bodies made of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics

import pytest

from fastserve.bench.requests import Planned, body_of, plan_requests, shape_of
from fastserve.bench.serve_config import ServeBenchConfig
from fastserve.settings.option import ConfigError
from fastserve.sim.workload import HASH_ID_TOKENS


def test_lengths_are_drawn_around_those_asked_for():
    """Within the ratio, both ends reached; ratio 0 is exact."""
    config = ServeBenchConfig(
        num_prompts=300, random_input_len=20, random_output_len=10, random_range_ratio=0.5
    )
    made = plan_requests(config)
    lengths = [len(request.prompt_token_ids) for request in made]
    assert (min(lengths), max(lengths)) == (10, 30)
    outputs = [request.num_output_tokens for request in made]
    assert (min(outputs), max(outputs)) == (5, 15)
    assert made == plan_requests(config)
    exact = plan_requests(ServeBenchConfig(num_prompts=3, random_input_len=20))
    assert {len(request.prompt_token_ids) for request in exact} == {20}
    assert {request.due_s for request in exact} == {0.0}


@pytest.mark.parametrize(
    ("window", "flags", "expected"),
    [
        (None, {}, (1000, 1024, 128)),
        (131072, {}, (1000, 1024, 128)),
        (8192, {}, (1000, 1024, 128)),
        (4096, {}, (100, 256, 128)),
        (2048, {}, (100, 128, 64)),
        (16, {}, (100, 1, 1)),
        (2048, {"num_prompts": 7}, (7, 128, 64)),
        (2048, {"random_input_len": 1024, "random_output_len": 128}, (100, 1024, 128)),
    ],
)
def test_requests_suit_the_window_where_nothing_is_asked_for(window, flags, expected):
    """vLLM's lengths where they are small beside it; what is asked for always counts."""
    assert shape_of(ServeBenchConfig(**flags), window) == expected


def test_lengths_beyond_the_window_are_refused():
    """With the longest that may be drawn; an answer that may end early needs one token."""
    config = ServeBenchConfig(random_input_len=90, random_output_len=11)
    assert shape_of(config, 101).output_len == 11
    with pytest.raises(ConfigError, match=r"90 \+ 11 tokens exceed the model's window of 100"):
        plan_requests(config, 100)
    assert shape_of(dataclasses.replace(config, ignore_eos=False), 91).output_len == 11


def test_prompts_share_the_prefix_asked_for_and_no_more():
    """The first tokens are equal, the next differ, and ids stay below the limit."""
    made = plan_requests(
        ServeBenchConfig(
            num_prompts=20, random_input_len=9, random_prefix_len=5, random_vocab_size=70
        )
    )
    assert len({tuple(request.prompt_token_ids[:5]) for request in made}) == 1
    assert len({tuple(request.prompt_token_ids[5:]) for request in made}) == 20
    ids = {token_id for request in made for token_id in request.prompt_token_ids}
    assert (min(ids), max(ids)) == (0, 69)


@pytest.mark.parametrize(("burstiness", "cv"), [(1.0, 1.0), (4.0, 0.5)])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float, cv: float):
    """Gamma gaps: mean 1 / rate, coefficient of variation 1 / √burstiness."""
    config = ServeBenchConfig(
        num_prompts=5000, random_input_len=1, request_rate=20.0, burstiness=burstiness
    )
    due = [request.due_s for request in plan_requests(config)]
    gaps = [later - sooner for sooner, later in itertools.pairwise(due)]
    assert due[0] == 0.0
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=0.05)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.06)


def test_a_trace_is_followed(tmp_path):
    """Its lengths, its arrivals from the first on, and equal ids where it says so."""
    path = tmp_path / "trace.jsonl"
    rows = [
        {"arrived_at": at, "prompt_tokens": 2 * HASH_ID_TOKENS + 3, "output_tokens": at,
         "hash_ids": [1, tail]}
        for at, tail in ((5, 7), (6, 8), (9, 7))
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = plan_requests(ServeBenchConfig(trace=str(path)))
    assert [request.due_s for request in made] == [0.0, 1.0, 4.0]
    assert [request.num_output_tokens for request in made] == [5, 6, 9]
    first, second, third = (request.prompt_token_ids for request in made)
    assert {len(first), len(second), len(third)} == {2 * HASH_ID_TOKENS + 3}
    assert first[:HASH_ID_TOKENS] == second[:HASH_ID_TOKENS]
    assert first[: 2 * HASH_ID_TOKENS] == third[: 2 * HASH_ID_TOKENS]
    assert first[HASH_ID_TOKENS:] != second[HASH_ID_TOKENS:]
    assert first[-3:] != third[-3:]
    assert len(plan_requests(ServeBenchConfig(trace=str(path), num_prompts=2))) == 2


def test_bodies_carry_what_was_asked_for():
    """Ids for completions, words for chats; unset fields are left to the server."""
    request = Planned(0.0, [4, 5], 6)
    body = body_of(request, ServeBenchConfig(top_k=3, extra_body='{"priority": 2}'), "m")
    assert body == {
        "model": "m", "prompt": [4, 5], "max_tokens": 6, "ignore_eos": True, "temperature": 0.0,
        "top_k": 3, "priority": 2, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    chat = body_of(request, ServeBenchConfig(backend="openai-chat", ignore_eos=False), "m")
    assert chat["messages"] == [{"role": "user", "content": "w4 w5"}]
    assert chat["max_completion_tokens"] == 6
    assert "ignore_eos" not in chat


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"percentile_metrics": "ttft,speed"}, "'speed' is not one of: ttft"),
        ({"metric_percentiles": "50,101"}, "--metric-percentiles"),
        ({"metric_percentiles": "x"}, "--metric-percentiles"),
        ({"extra_body": "[1]"}, "not a JSON object"),
        ({"extra_body": "{"}, "--extra-body: not JSON"),
        ({"random_range_ratio": 1.0}, "--random-range-ratio"),
    ],
)
def test_settings_without_a_meaning_are_refused(flags, words):
    """Before anything is sent."""
    with pytest.raises(ConfigError, match=words):
        ServeBenchConfig(**flags)
