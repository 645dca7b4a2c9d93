"""OpenAI's client against the live server: what people do with it, over real sockets."""

from __future__ import annotations

import json
import re
import socket

import httpx
import openai
import pytest

from tests.server.conftest import API_KEY, OTHER_KEY

pytestmark = pytest.mark.processes

PROMPT = "The engine schedules"
MESSAGES = [{"role": "user", "content": "What is a block table?"}]
GREEDY = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
HEADERS = {"Authorization": f"Bearer {API_KEY}"}


def test_completion(client):
    """Text, finish reason, usage."""
    answer = client.completions.create(**GREEDY, extra_body={"ignore_eos": True})
    assert answer.object == "text_completion"
    assert answer.model == "demo"
    [choice] = answer.choices
    assert choice.text
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_concatenates_to_the_answer(client):
    """Completions and chats alike; the last chunk has the finish reason."""
    whole = client.completions.create(**GREEDY).choices[0]
    chunks = list(client.completions.create(**GREEDY, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert [c.choices[0].finish_reason for c in chunks][-1] == whole.finish_reason
    asked = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    said = client.chat.completions.create(**asked).choices[0]
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == said.message.content
    assert pieces[-1].choices[0].finish_reason == said.finish_reason


def test_chat_is_the_completion_of_its_rendered_prompt(client, server_url):
    """/tokenize shows the ids; completing them says the same."""
    shown = httpx.post(server_url + "/tokenize", json={"messages": MESSAGES}, headers=HEADERS)
    chat = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_tokens=10
    )
    completion = client.completions.create(
        model="demo", prompt=shown.json()["tokens"], temperature=0, max_tokens=10
    )
    assert completion.choices[0].text == chat.choices[0].message.content
    assert completion.usage.prompt_tokens == shown.json()["count"] == chat.usage.prompt_tokens


def test_choices_draw_by_seed_plus_index(client):
    """Choice i of seed s is choice 0 of seed s + i; other seeds differ."""
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.0}
    several = client.completions.create(**asked, n=3, seed=7)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    alone = [client.completions.create(**asked, seed=7 + i).choices[0].text for i in range(3)]
    assert [choice.text for choice in several.choices] == alone
    assert len(set(alone)) > 1


def test_streamed_choices_carry_their_index(client):
    """Two prompts of two choices each, interleaved, each as if alone."""
    prompts = [PROMPT, "Memory"]
    asked = {"model": "demo", "max_tokens": 8, "seed": 3, "n": 2}
    texts = ["", "", "", ""]
    for chunk in client.completions.create(**asked, prompt=prompts, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
    alone = [
        choice.text
        for prompt in prompts
        for choice in client.completions.create(**asked, prompt=prompt).choices
    ]
    assert texts == alone


def test_logprobs_of_a_greedy_completion(client):
    """The chosen token is the best; the lists run along; the text is the tokens'."""
    answer = client.completions.create(**GREEDY, logprobs=3, extra_body={"ignore_eos": True})
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 12
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 3
    assert found.text_offset[0] == 0


def test_echo_scores_the_prompt_as_generation_would(client):
    """Feeding an answer back gives its tokens the same log probabilities."""
    first = client.completions.create(**GREEDY, logprobs=1).choices[0]
    again = client.completions.create(
        model="demo", prompt=PROMPT + first.text, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert again.text == PROMPT + first.text
    assert again.logprobs.token_logprobs[0] is None
    if again.logprobs.tokens[-len(first.logprobs.tokens) :] == first.logprobs.tokens:
        scores = again.logprobs.token_logprobs[-len(first.logprobs.tokens) :]
        assert scores == pytest.approx(first.logprobs.token_logprobs, abs=1e-3)


def test_chat_logprobs(client):
    """One entry a token, with bytes that spell the text."""
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True,
        top_logprobs=2, extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    spelled = b"".join(bytes(entry.bytes) for entry in content)
    assert spelled.decode(errors="replace") == answer.choices[0].message.content


def test_stop_strings_end_an_answer(client):
    """The text ends before it, or with it when asked; the reason names it."""
    text = client.completions.create(**GREEDY).choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = client.completions.create(**GREEDY, stop=[stop]).choices[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.stop_reason == stop
    kept = client.completions.create(
        **GREEDY, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == text[: text.index(stop)] + stop
    streamed = client.completions.create(**GREEDY, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.text


def test_stop_token_ids_end_an_answer(client):
    """The id is named and has no text."""
    extra = {"return_token_ids": True}
    ids = client.completions.create(**GREEDY, extra_body=extra).choices[0].token_ids
    stop = ids[4]
    answer = client.completions.create(**GREEDY, extra_body={**extra, "stop_token_ids": [stop]})
    [choice] = answer.choices
    assert choice.token_ids == ids[: ids.index(stop) + 1]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_usage_in_streams(client):
    """Null in every chunk but the last; running counts on request."""
    options = {"include_usage": True}
    chunks = list(client.completions.create(**GREEDY, stream=True, stream_options=options))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= 0
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk.usage.completion_tokens
        for chunk in client.completions.create(**GREEDY, stream=True, stream_options=options)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_prompt_sent_twice_is_cached(client):
    """usage.prompt_tokens_details says so."""
    asked = {"model": "demo", "prompt": list(range(300, 380)), "max_tokens": 1}
    client.completions.create(**asked)
    usage = client.completions.create(**asked).usage
    assert usage.prompt_tokens_details.cached_tokens >= 64


def cached_tokens(client, salt=None, **fields):
    """Return what was cached of a prompt of our own, of ids, as messages or streamed."""
    extra = {} if salt is None else {"cache_salt": salt}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    if "messages" in fields:
        answer = client.chat.completions.create(
            model="demo", max_tokens=1, extra_body=extra, **fields
        )
    elif fields.pop("streams", False):
        *_, answer = client.completions.create(
            model="demo", max_tokens=1, extra_body=extra, **options, **fields
        )
    else:
        answer = client.completions.create(model="demo", max_tokens=1, extra_body=extra, **fields)
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": list(range(400, 480))},
        {"prompt": list(range(500, 580)), "streams": True},
        {"messages": [{"role": "user", "content": "salt and pepper " * 40}]},
    ],
)
def test_salts_keep_prompts_apart(client, fields):
    """The same salt shares; another, and none, does not."""
    salts = ("a", "b", None)
    assert [cached_tokens(client, salt, **fields) for salt in salts] == [0, 0, 0]
    assert all(cached_tokens(client, salt, **fields) >= 64 for salt in salts)


@pytest.mark.parametrize("salt", [None, "a"])
def test_two_api_keys_share_no_prompts(client, server_url, salt):
    """Or one tenant could tell by time what another asks; a salt of one's own is no way around."""
    fields = {"prompt": [7 if salt else 8] * 80}
    with openai.OpenAI(base_url=server_url + "/v1", api_key=OTHER_KEY, max_retries=0) as other:
        assert cached_tokens(client, salt, **fields) == 0
        assert cached_tokens(other, salt, **fields) == 0
        assert cached_tokens(client, salt, **fields) >= 64
        assert cached_tokens(other, salt, **fields) >= 64


def test_metrics_of_a_request(client):
    """What happened to it, on request."""
    answer = client.completions.create(**GREEDY, extra_body={"return_metrics": True})
    metrics = answer.choices[0].metrics
    assert metrics["arrival"] <= metrics["first_token"] <= metrics["finished"]
    assert metrics["predicted_output_tokens"] > 0


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"max_tokens": 10**6, "prompt": [1] * 2045}, None, None),
        ({"prompt": [1] * 5000}, openai.BadRequestError, "prompt"),
        ({"prompt": [10**6]}, openai.BadRequestError, "prompt"),
        ({"prompt": ""}, None, None),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"logprobs": 100}, openai.BadRequestError, "logprobs"),
        ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"extra_body": {"top_k": 2**40}}, None, None),
        ({"extra_body": {"priority": 10**9}}, openai.BadRequestError, "priority"),
        ({"extra_body": {"cache_salt": ""}}, openai.BadRequestError, "cache_salt"),
        ({"extra_body": {"cache_salt": 5}}, openai.BadRequestError, "cache_salt"),
        ({"extra_body": {"cache_salt": "x" * 1025}}, openai.BadRequestError, "cache_salt"),
        ({"extra_body": {"no_such_field": 1}}, None, None),
        ({"seed": -5}, None, None),
        ({"seed": 2**63 - 1, "n": 2}, None, None),
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
    ],
)
def test_bad_values_are_refused_by_name_and_odd_ones_work(client, change, error, param):
    """And the server goes on."""
    asked = {**GREEDY, **change}
    if error is None:
        assert client.completions.create(**asked).choices
        return
    with pytest.raises(error) as caught:
        client.completions.create(**asked)
    assert caught.value.param == param
    assert client.completions.create(**GREEDY).choices


def test_a_wrong_key_is_refused(client, server_url):
    """401 with a challenge; who asks whether the server runs needs none."""
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    for path in ("/v1/models", "/version", "/metrics"):
        refused = httpx.get(server_url + path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready"):
        assert httpx.get(server_url + path).status_code == 200
        assert httpx.head(server_url + path).status_code == 200
    assert httpx.get(server_url + "/health").content == b""


def test_models(client):
    """The list and the one."""
    [model] = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").max_model_len == model.max_model_len > 0


def test_request_ids_are_echoed(server_url):
    """The client's own, in the header and in the answer's id."""
    headers = {**HEADERS, "X-Request-Id": "mine-1"}
    answer = httpx.post(server_url + "/v1/completions", json=GREEDY, headers=headers)
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"


def test_a_large_body_is_refused_while_it_is_read(server_url):
    """Announced or not."""
    announced = httpx.post(
        server_url + "/v1/completions", json={"prompt": "x" * 300_000}, headers=HEADERS
    )
    assert announced.status_code == 413

    def pieces():
        for _ in range(30):
            yield b"x" * 10_000

    headers = {**HEADERS, "Content-Type": "application/json"}
    unannounced = httpx.post(server_url + "/v1/completions", content=pieces(), headers=headers)
    assert unannounced.status_code == 413
    assert unannounced.json()["error"]["code"] == "request_too_large"


def num_aborted(server_url: str) -> float:
    """Count the requests that ended because their client left."""
    text = httpx.get(server_url + "/metrics", headers=HEADERS).text
    found = re.search(r'^fastserve:request_success_total{.*"abort".*} (\S+)$', text, re.MULTILINE)
    assert found, text
    return float(found.group(1))


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_ends_its_requests(server_url, is_stream):
    """All choices of it, streamed or not."""
    before = num_aborted(server_url)
    asked = {"prompt": PROMPT, "n": 3, "max_tokens": 1900, "stream": is_stream, "ignore_eos": True}
    body = json.dumps(asked).encode()
    host, port = server_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {API_KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        if is_stream:
            assert b"200 OK" in connection.recv(100)
        else:  # another request's answer shows that this one was taken up
            httpx.post(server_url + "/v1/completions", json=GREEDY, headers=HEADERS)
    for _ in range(2000):  # bounded by requests made, not by time
        if num_aborted(server_url) == before + 3:
            break
    assert num_aborted(server_url) == before + 3


def test_a_prompt_that_fills_the_window_is_scored(client):
    """Nothing has to be generated of it; one token more is refused, and so is an output."""
    window = client.models.retrieve("demo").max_model_len
    asked = {"model": "demo", "echo": True, "logprobs": 0, "max_tokens": 0}
    ids = [100 + i % 900 for i in range(window)]
    full = client.completions.create(**asked, prompt=ids)
    [choice] = full.choices
    assert full.usage.prompt_tokens == full.usage.total_tokens == window
    scores = choice.logprobs.token_logprobs
    assert len(scores) == len(choice.logprobs.text_offset) == window
    [shorter] = client.completions.create(**asked, prompt=ids[:-1]).choices
    assert scores[1:-1] == pytest.approx(shorter.logprobs.token_logprobs[1:], abs=1e-3)
    assert scores[-1] < 0
    for change in ({"prompt": [*ids, 100]}, {"prompt": ids, "max_tokens": 1}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**{**asked, **change})
        assert refused.value.code == "context_length_exceeded"
