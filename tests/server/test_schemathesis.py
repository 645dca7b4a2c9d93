"""schemathesis against the API as it describes itself: what fits the description and what does not.

Whether a request is taken is not its business here: types are read as leniently as vLLM reads them,
and some limits (the vocabulary, the window) are the model's. What is answered is: never a 5xx, no
status, media type or shape that is not described, and nothing without the key.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import (
    GenerationConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.server.conftest import API_KEY
from tests.server.scripted import TOKENIZER, ScriptedEngine, make_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
    ignored_auth,
]
ROLES = ("user", "assistant", "system")
FEW_CHOICES = 3  # thousands of them take minutes
HEADERS = {"Authorization": f"Bearer {API_KEY}"}
FEW = settings(
    max_examples=50,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def config() -> SchemathesisConfig:
    """Return the settings of every run: both kinds of data, the key, the same data every time."""
    generation = GenerationConfig(
        modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE],
        deterministic=True,
        database="none",
    )
    project = ProjectConfig(headers=HEADERS, generation=generation)
    return SchemathesisConfig(projects=ProjectsConfig(default=project))


def attack(case: Case, base_url: str | None = None) -> None:
    """Send one request, in this process if to no address, and judge what comes back."""
    if isinstance(case.body, dict):
        reach_the_engine(case.body)
    case.validate_response(case.call(base_url, timeout=60), checks=CHECKS)


def reach_the_engine(body: dict[str, Any]) -> None:
    """Give a request what no generator guesses: a model, ids and roles that exist, few choices."""
    if isinstance(body.get("model"), str):
        del body["model"]
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], FEW_CHOICES)
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and isinstance(message.get("role"), str):
            message["role"] = ROLES[len(message["role"]) % len(ROLES)]
            message["content"] = message.get("content") or "x"
    for name in ("tokens", "prompt", "stop_token_ids"):
        ids = body.get(name)
        if isinstance(ids, list):
            body[name] = [
                item % TOKENIZER.vocab_size if type(item) is int and item >= 0 else item
                for item in ids
            ]


APP = make_app(ScriptedEngine(), api_key=(API_KEY,), allowed_hosts=("testserver",))
in_process = schemathesis.openapi.from_asgi("/openapi.json", APP, config=config(), headers=HEADERS)


@pytest.mark.no_cover
@in_process.parametrize()
@FEW
def test_any_request_is_answered_as_described(case: Case) -> None:
    """50 examples an operation over a scripted engine, and every bound of the schemas."""
    attack(case)
