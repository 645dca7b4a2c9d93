"""What every request passes: key, size of the body, request id, log line."""

from __future__ import annotations

import logging

import pytest

from fastserve.host.log_lines import LineFormatter
from tests.server.scripted import ScriptedEngine, call, make_app

BODY = {"prompt": "x"}


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401), ("Bearer wrong", 401), ("Basic key", 401), ("key", 401), ("Bearer ", 401),
        ("Bearer clé", 401), ("Bearer key", 200), ("bearer  key", 200),
    ],
)  # fmt: skip
def test_the_key(header, status):
    """As a bearer token, exactly."""
    app = make_app(ScriptedEngine(), api_key=("key",))
    headers = {} if header is None else {"Authorization": header.encode()}
    response = call(app, "POST", "/v1/completions", json=BODY, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(("key", "status"), [("k1", 200), ("k2", 200), ("k", 401), ("k1 k2", 401)])
def test_any_of_several_keys_will_do(key, status):
    """Each alone, and nothing else."""
    app = make_app(ScriptedEngine(), api_key=("k1", "k2"))
    headers = {"Authorization": f"Bearer {key}"}
    assert call(app, "GET", "/v1/models", headers=headers).status_code == status


def salts_of(*keys):
    """Return what requests share KV by: for each key shown, without a salt and with "0:"."""
    engine = ScriptedEngine()
    app = make_app(engine, api_key=keys)
    for key in keys or ("any",):
        for extra in ({}, {"cache_salt": "0:"}):
            headers = {"Authorization": f"Bearer {key}"}
            body = {**BODY, **extra}
            assert call(app, "POST", "/v1/completions", json=body, headers=headers).is_success
    return [stream.cache_salt for stream in engine.streams]


@pytest.mark.parametrize("keys", [(), ("key",), ("key", "key")])
def test_without_several_keys_all_share_kv(keys):
    """But for those who ask not to."""
    assert set(salts_of(*keys)) == {"", "0:"}


def test_each_of_several_keys_shares_kv_with_itself_alone():
    """No salt that one sends is another's, and no key is in it: a journal holds it."""
    salts = salts_of("k1", "k2", "k3")
    assert len(set(salts)) == 6
    assert all(salts)
    assert not any("k" in salt for salt in salts)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models/", None),
        ("GET", "/v1/models/tiny/", None),
        ("GET", "/health/", None),
        ("GET", "/metrics//", None),
        ("POST", "/v1/completions/", BODY),
        ("POST", "/tokenize/", BODY),
    ],
)
def test_a_slash_behind_a_path_changes_nothing(method, path, body):
    """Clients that join addresses carelessly get the answer, not a 404."""
    app = make_app(ScriptedEngine())
    given, plain = (call(app, method, p, json=body) for p in (path, path.rstrip("/")))
    assert (given.status_code, plain.status_code) == (200, 200)
    if path == "/v1/models/":
        assert given.json() == plain.json()
        assert given.json()["object"] == "list"


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_who_asks_whether_it_runs_needs_no_key(path, method):
    """That is all they are told."""
    assert call(make_app(ScriptedEngine(), api_key=("key",)), method, path).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/docs", "/openapi.json", "/version", "/metrics", "/nowhere", "/health/x"],
)
def test_all_else_needs_the_key(path):
    """Also what does not exist; without keys nothing does."""
    assert call(make_app(ScriptedEngine(), api_key=("key",)), "GET", path).status_code == 401
    assert call(make_app(ScriptedEngine()), "GET", path).status_code != 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200),
        ("LOCALHOST.", 200), ("app.localhost", 200),
        ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("192.168.0.7", 403), ("[::1", 403), ("", 403),
    ],
)  # fmt: skip
def test_a_server_of_this_machine_has_no_other_names(host, status):
    """A page that lets a name of its own mean this machine gets nothing: it needs no key."""
    app = make_app(ScriptedEngine())
    answer = call(app, "POST", "/v1/completions", json=BODY, headers={"Host": host})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "unknown_host"


@pytest.mark.parametrize(
    ("bound_to", "given", "host", "status"),
    [
        ("127.0.0.1", ("api.example", "*.test"), "API.example:80", 200),
        ("127.0.0.1", ("api.example", "*.test"), "a.b.test", 200),
        ("127.0.0.1", ("api.example", "*.test"), "test", 403),
        ("127.0.0.1", ("api.example", "*.test"), "x.api.example", 403),
        ("127.0.0.1", ("*",), "evil.example", 200),
        ("0.0.0.0", (), "api.example", 200),
        ("0.0.0.0", ("api.example",), "evil.example", 403),
        ("0.0.0.0", ("api.example",), "localhost", 200),
        ("10.0.0.5", ("api.example",), "10.0.0.5:8000", 200),
    ],
)
def test_a_server_may_be_given_names(bound_to, given, host, status):
    """One that others reach takes any, until it is given some."""
    app = make_app(ScriptedEngine(), host=bound_to, allowed_hosts=given)
    assert call(app, "GET", "/version", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("is_announced", [True, False])
def test_the_size_of_a_body(is_announced):
    """Counted as it is read, whatever the headers say."""
    app = make_app(ScriptedEngine(), max_body_bytes=1024)
    content = b'{"prompt": "' + b"x" * 1100 + b'"}'

    async def pieces():
        for start in range(0, len(content), 100):
            yield content[start : start + 100]

    body = content if is_announced else pieces()
    headers = {"Content-Type": "application/json"}
    response = call(app, "POST", "/v1/completions", content=body, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("given", "is_echoed"),
    [
        ("abc-1._Z", True), ("x" * 128, True), ("x" * 129, False), ("é", False), (None, False),
        ("a b", False), ('a"b', False), ("a%0Ab", False), ("a/b", False), ("", False),
    ],
)  # fmt: skip
def test_request_ids(given, is_echoed):
    """The client's own if it is one plain word, else a new one; errors carry one too."""
    headers = {} if given is None else {"X-Request-Id": given.encode()}
    for path in ("/version", "/nowhere"):
        echoed = call(make_app(ScriptedEngine()), "GET", path, headers=headers)
        assert (echoed.headers["x-request-id"] == given) is is_echoed
        assert echoed.headers["x-request-id"]


@pytest.mark.parametrize("is_off", [False, True])
def test_a_line_per_request(caplog, is_off):
    """Without prompts; none for watchers; none at all when switched off."""
    app = make_app(ScriptedEngine(), disable_log_requests=is_off)
    with caplog.at_level(logging.INFO, logger="fastserve.server.gate"):
        call(app, "POST", "/v1/completions", json={"prompt": "secret"})
        call(app, "GET", "/metrics")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (0 if is_off else 1)
    assert all("POST /v1/completions 200" in line and "secret" not in line for line in lines)


@pytest.mark.parametrize("given", [None, "0123456789abcdef" * 2, "req-2024-000017"])
def test_a_line_of_the_log_fits_a_terminal(caplog, given):
    """It shows the beginning of our 32 digits, which the header has in full, and any other id."""
    headers = {} if given is None else {"X-Request-Id": given}
    app = make_app(ScriptedEngine())
    with caplog.at_level(logging.INFO, logger="fastserve.server.gate"):
        answer = call(app, "POST", "/v1/chat/completions", json={}, headers=headers)
    [record] = caplog.records
    line = LineFormatter().format(record)
    assert len(line) <= 80
    echoed = answer.headers["x-request-id"]
    assert line.endswith(f" ms {given if given == 'req-2024-000017' else echoed[:8]}")
    assert len(echoed) == len(given or "0" * 32)


def test_a_path_cannot_write_lines_into_the_log(caplog):
    """It stands there as it was sent."""
    with caplog.at_level(logging.INFO, logger="fastserve.server.gate"):
        call(make_app(ScriptedEngine()), "GET", "/a%0A%1b[31mINFO")
    [record] = caplog.records
    assert "GET /a%0A%1b[31mINFO 404" in record.getMessage()
