"""What test_schemathesis.py asks in short: many more examples, and a live server.

Examples are made as these tests are collected, which takes seconds: the conftest leaves this file
alone where slow tests do not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import settings
from schemathesis import Case

from tests.server.conftest import serving
from tests.server.test_schemathesis import APP, FEW, HEADERS, attack, config, in_process

MANY = settings(FEW, max_examples=1000)
over_http = schemathesis.openapi.from_dict(APP.openapi(), config=config())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@in_process.parametrize()
@MANY
def test_very_many_requests_are_answered_as_described(case: Case) -> None:
    """The same with 1,000 examples an operation."""
    attack(case)


@pytest.fixture(scope="module")
def live_url() -> Iterator[str]:
    """A live server whose window is small, so that no request is long."""
    with serving("--max-model-len", "64", "--max-body-bytes", "200000") as (_, url):
        assert httpx.get(f"{url}/openapi.json", headers=HEADERS).json() == APP.openapi()
        yield url
        exposition = httpx.get(f"{url}/metrics", headers=HEADERS).text
        assert re.search(r"^fastserve:engine_restarts_total{.*} 0\.0$", exposition, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(3600)
@over_http.parametrize()
@FEW
def test_a_live_server_answers_as_described(case: Case, live_url: str) -> None:
    """50 examples an operation, to a real engine, which lives on."""
    attack(case, base_url=live_url)
