"""Pages of other origins: shut out by default, let in by --allowed-origins."""

from __future__ import annotations

import pytest

from fastserve.settings.mapping import from_mapping
from fastserve.settings.server import ServerConfig
from tests.server.scripted import ScriptedEngine, call, make_app

PAGE = "https://page.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
COMPLETIONS = "/v1/completions"


def cors_of(response) -> dict[str, str]:
    """Return the headers that a browser decides by."""
    return {k: v for k, v in response.headers.items() if k.startswith("access-control-")}


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models", "/v1/nowhere"])
def test_a_preflight_needs_no_key(path):
    """Browsers send none with it; it is answered 200, with what the page may do."""
    app = make_app(ScriptedEngine(), api_key=("key",), allowed_origins=(PAGE,))
    response = call(app, "OPTIONS", path, headers=PREFLIGHT)
    assert response.status_code == 200
    allowed = cors_of(response)
    assert allowed["access-control-allow-origin"] == PAGE
    assert "POST" in allowed["access-control-allow-methods"]
    assert "authorization" in allowed["access-control-allow-headers"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"prompt": "x"}, {"Authorization": "Bearer key"}, 200),
        ({"prompt": "x"}, {}, 401),
        ({"prompt": 5}, {"Authorization": "Bearer key"}, 400),
        ({"prompt": "x", "model": "other"}, {"Authorization": "Bearer key"}, 404),
        ({"prompt": "x" * 2000}, {"Authorization": "Bearer key"}, 413),
        ({"prompt": "x"}, {"Authorization": "Bearer key", "Content-Type": "text/plain"}, 415),
    ],
)
def test_every_answer_can_be_read_by_an_allowed_page(body, headers, status):
    """Refusals too, and under which name they were logged."""
    app = make_app(ScriptedEngine(), api_key=("key",), allowed_origins=(PAGE,), max_body_bytes=1024)
    response = call(app, "POST", COMPLETIONS, json=body, headers={"Origin": PAGE, **headers})
    assert response.status_code == status
    assert cors_of(response)["access-control-allow-origin"] == PAGE
    assert "X-Request-Id" in cors_of(response)["access-control-expose-headers"]


def test_other_pages_stay_out():
    """Their preflight fails, and no answer names them."""
    app = make_app(ScriptedEngine(), allowed_origins=(PAGE,))
    other = {**PREFLIGHT, "Origin": "https://other.example"}
    assert call(app, "OPTIONS", COMPLETIONS, headers=other).status_code == 400
    response = call(app, "POST", COMPLETIONS, json={"prompt": "x"}, headers=other)
    assert "access-control-allow-origin" not in cors_of(response)


def test_no_page_is_let_in_by_default():
    """Without the setting no answer has a header for browsers."""
    app = make_app(ScriptedEngine())
    for method, body in (("OPTIONS", None), ("POST", {"prompt": "x"})):
        response = call(app, method, COMPLETIONS, json=body, headers=PREFLIGHT)
        assert cors_of(response) == {}
    assert call(app, "OPTIONS", COMPLETIONS, headers=PREFLIGHT).status_code == 405


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"allowed_origins": ("*",)}, ("*", None)),
        ({"allowed_origins": ("*",), "allow_credentials": True}, (PAGE, "true")),
        ({"allowed_origins": (PAGE,), "allow_credentials": True}, (PAGE, "true")),
    ],
)
def test_all_pages_and_cookies(settings, expected):
    """A star is sent as such only where no cookies may come with it."""
    headers = {**PREFLIGHT, "Cookie": "a=b"}
    response = call(make_app(ScriptedEngine(), **settings), "OPTIONS", COMPLETIONS, headers=headers)
    found = cors_of(response)
    assert response.status_code == 200
    assert (
        found["access-control-allow-origin"],
        found.get("access-control-allow-credentials"),
    ) == expected


def test_methods_and_headers_can_be_narrowed():
    """What is not named is refused at the preflight."""
    app = make_app(
        ScriptedEngine(),
        allowed_origins=(PAGE,),
        allowed_methods=("GET",),
        allowed_headers=("authorization", "content-type"),
    )
    assert call(app, "OPTIONS", COMPLETIONS, headers=PREFLIGHT).status_code == 400
    getting = {**PREFLIGHT, "Access-Control-Request-Method": "GET"}
    assert call(app, "OPTIONS", "/v1/models", headers=getting).status_code == 200
    odd = {**getting, "Access-Control-Request-Headers": "x-odd"}
    assert call(app, "OPTIONS", "/v1/models", headers=odd).status_code == 400


@pytest.mark.parametrize("given", [["a", "b"], ['["a", "b"]'], '["a", "b"]'])
def test_origins_are_words_or_a_json_list(given):
    """As vLLM writes them, and as one would."""
    config = from_mapping(ServerConfig, {"allowed_origins": given}, source="flags")
    assert config.allowed_origins == ("a", "b")
