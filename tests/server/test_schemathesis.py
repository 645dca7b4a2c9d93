"""schemathesis against the API as it describes itself: what fits the description and what does not.

Whether a request is taken is not its business here: types are read as leniently as vLLM reads them,
and some limits (the vocabulary, the window) are the model's. What is answered is: never a 5xx, no
status, media type or shape that is not described, and nothing without the key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
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

from tests.server.conftest import API_KEY, serving
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
FEW, MANY = (
    settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    for count in (50, 1000)
)


def config() -> SchemathesisConfig:
    """Return the settings of both runs: both kinds of data, the key, the same data every time."""
    generation = GenerationConfig(
        modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE],
        deterministic=True,
        database="none",
    )
    project = ProjectConfig(headers={"Authorization": f"Bearer {API_KEY}"}, generation=generation)
    return SchemathesisConfig(projects=ProjectsConfig(default=project))


def attack(case: Case) -> None:
    """Send one request and judge what comes back."""
    if isinstance(case.body, dict):
        reach_the_engine(case.body)
    case.validate_response(case.call(timeout=60), checks=CHECKS)


def reach_the_engine(body: dict[str, Any]) -> None:
    """Give a request a model and ids that exist, since no generator can guess them."""
    if isinstance(body.get("model"), str):
        del body["model"]
    for name in ("tokens", "prompt", "stop_token_ids"):
        ids = body.get(name)
        if isinstance(ids, list):
            body[name] = [
                item % TOKENIZER.vocab_size if type(item) is int and item >= 0 else item
                for item in ids
            ]


in_process = schemathesis.openapi.from_asgi(
    "/openapi.json",
    make_app(ScriptedEngine(), api_key=(API_KEY,)),
    config=config(),
    headers={"Authorization": f"Bearer {API_KEY}"},
)


@in_process.parametrize()
@FEW
def test_any_request_is_answered_as_described(case: Case) -> None:
    """50 examples an operation over a scripted engine, and every bound of the schemas."""
    attack(case)


@pytest.fixture(scope="module")
def live_schema() -> Iterator[schemathesis.BaseSchema]:
    """The description of a live server whose window is small, so that no request is long."""
    with serving("--max-model-len", "64", "--max-body-bytes", "200000") as (_, url):
        headers = {"Authorization": f"Bearer {API_KEY}"}
        yield schemathesis.openapi.from_url(f"{url}/openapi.json", config=config(), headers=headers)
        exposition = httpx.get(f"{url}/metrics").text
        assert 'fastserve:engine_restarts_total{engine="0",model_name="demo"} 0.0' in exposition


live = schemathesis.pytest.from_fixture("live_schema")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(3600)
@live.parametrize()
@MANY
def test_a_live_server_answers_as_described(case: Case) -> None:
    """1,000 examples an operation, to a real engine, which lives on."""
    attack(case)
