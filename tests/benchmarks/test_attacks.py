"""Attacks on a live server, and what is told of them."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import attacks
from benchmarks.attack_kinds import ATTACKS, BODY_BYTES, Attack, filled
from benchmarks.live_server import LiveServer
from benchmarks.neighbours import HEALTH_PERIOD_S, Seen
from fastserve.settings.server import ServerConfig

SERVED = {
    "ids",
    "n",
    "n of a long prompt",
    "stop lists",
    "scores",
    "scores of a prompt",
    "a long text",
}


def test_bodies_are_as_large_as_are_read() -> None:
    """And whole: whatever refuses them, it is not that."""
    body = filled(b'{"prompt":[', b"[5],", b"[5]]}")
    assert BODY_BYTES - 10 < len(body) <= BODY_BYTES < ServerConfig().max_body_bytes
    assert len(json.loads(body)["prompt"]) > 1_000_000


def test_each_client_attacks_at_least_once() -> None:
    """However short the time is."""
    server = LiveServer("nowhere", 0, None)  # type: ignore[arg-type]
    ends = attacks.repeat(server, Attack(lambda server: server.host, 3), 0.0)
    assert ends == {"nowhere": 3}


def test_who_waits_counts_for_all_that_would_have_come() -> None:
    """A server that stands still for a second shows in more than one of many figures."""
    seen = Seen()
    for _ in range(100):
        seen.add_health(HEALTH_PERIOD_S / 2)
    seen.add_health(20 * HEALTH_PERIOD_S)
    assert len(seen.health_s) == 120
    assert seen.health_percentile_s(50) == HEALTH_PERIOD_S / 2
    assert seen.health_percentile_s(99) > 18 * HEALTH_PERIOD_S


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(600)
def test_every_attack_meets_its_end(monkeypatch, tmp_path) -> None:
    """Refused or served, as it should be; neighbours have the answers they always have."""
    output = tmp_path / "attacks.json"
    monkeypatch.setattr(sys, "argv", ["attacks", "--seconds", "0.1", "--output", str(output)])
    assert attacks.main() == 0
    result = json.loads(output.read_text())["attacks"]
    assert set(result) == set(ATTACKS)
    for name, found in result.items():
        assert found["neighbours_failures"] == [], name
        assert found["canaries"] > 0, name
        assert found["canaries_different"] == 0, name
        if name in SERVED:
            assert set(found["ends"]) == {"200"}, name
        else:
            assert "200" not in set(found["ends"]) or name == "streams that are not read", name
        assert not [end for end in found["ends"] if end.startswith("5") and end != "503"], name
