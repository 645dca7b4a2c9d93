"""Bodies: only JSON that says it is JSON."""

from __future__ import annotations

import gc
import gzip
import time

import pytest

from tests.server.scripted import ScriptedEngine, call, make_app, post
from tests.server.test_errors import error_of

ROUTES = {
    "/v1/completions": b'{"prompt":"x"}',
    "/v1/chat/completions": b'{"messages":[{"role":"user","content":"x"}]}',
    "/tokenize": b'{"prompt":"x"}',
    "/detokenize": b'{"tokens":[5]}',
}


def send(path: str, content: bytes, **headers: str):
    """POST bytes; returns the response and the streams that the engine was given."""
    engine = ScriptedEngine()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return call(make_app(engine), "POST", path, content=content, headers=named), engine.streams


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "media_type",
    [
        "application/json", "application/json; charset=utf-8", "application/json;charset=UTF-8",
        "Application/JSON", "application/vnd.api+json", "application/ld+json; charset=utf-8",
    ],
)  # fmt: skip
def test_json_by_any_of_its_names_is_read(path, media_type):
    """With a charset, in any case, as one of its dialects."""
    response, _ = send(path, ROUTES[path], Content_Type=media_type)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "media_type",
    [
        None, "", "text/plain", "text/plain; charset=utf-8", "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x", "text/json", "application/jsonp", "json", "+json",
        "text/plain+json", "application/json, text/plain",
    ],
)  # fmt: skip
def test_what_a_page_can_post_without_asking_is_a_415(path, media_type):
    """No Content-Type, plain text and forms need no preflight: the work must not be done."""
    headers = {} if media_type is None else {"Content_Type": media_type}
    response, streams = send(path, ROUTES[path], **headers)
    error = error_of(response, 415)
    assert "Content-Type must be application/json" in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "unsupported_media_type")
    assert not streams


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "GZIP"])
def test_compressed_bodies_are_a_415(encoding):
    """By name, with what is taken instead; not as JSON that cannot be read."""
    content = gzip.compress(ROUTES["/v1/completions"])
    response, _ = send(
        "/v1/completions", content, Content_Type="application/json", Content_Encoding=encoding
    )
    assert encoding.lower() in error_of(response, 415)["message"]
    assert response.headers["accept-encoding"] == "identity"


def test_identity_is_no_encoding():
    """Some clients say so."""
    path = "/v1/completions"
    response, _ = send(
        path, ROUTES[path], Content_Type="application/json", Content_Encoding="identity"
    )
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("path", "start", "item", "end"),
    [
        ("/v1/completions", b'{"prompt": [', b"[5],", b"[5]]}"),
        ("/v1/completions", b'{"prompt": [', b"5,", b"5]}"),
        ("/v1/completions", b'{"prompt": ["x"], "metadata": [', b"[],", b"[]]}"),
        ("/v1/completions", b'{"prompt": "x", "logit_bias": {', b'"5": 1.0,', b'"6": 1.0}}'),
        ("/v1/chat/completions", b'{"messages": [', b'{"role":"","content":""},', b"{}]}"),
        ("/detokenize", b'{"tokens": [', b"5,", b"5]}"),
    ],
)
def test_a_large_body_of_too_many_values_is_a_413(path, start, item, end):
    """It is not parsed: that would make objects of them, and hold everybody up."""
    content = start + item * (3 * 2**20 // len(item)) + end
    gc.disable()  # what other tests have left takes it longer than this
    try:
        began = time.thread_time()
        response, streams = send(path, content, Content_Type="application/json")
        assert time.thread_time() - began < 0.5
    finally:
        gc.enable()
    error = error_of(response, 413)
    assert error["code"] == "request_too_large"
    assert not streams


def test_a_large_text_is_no_large_number_of_values():
    """Whatever stands in it; nor are as many ids as the window has."""
    text = '[{,:}]\\"' * 2**15
    engine = ScriptedEngine(max_model_len=2**17, max_request_tokens=2**17)
    body = {"prompt": [5] * (2**17 - 100), "max_tokens": 1, "note": text}
    response = post(engine, "/v1/completions", body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["x"] * (2**13 + 1)}),
        ("/v1/completions", {"prompt": [[5]] * (2**13 + 1)}),
        ("/tokenize", {"messages": [{"role": "", "content": [""] * (2**13 + 1)}]}),
    ],
)
def test_a_list_of_prompts_or_parts_has_its_own_limit(path, body):
    """Each of them costs as much as many ids."""
    error = error_of(post(ScriptedEngine(), path, body), 400)
    assert "at most 8192 items" in error["message"]
