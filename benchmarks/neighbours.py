"""The neighbours of a server's attacker, and what they see of the attack.

`watched(url, key)` runs them in a process of their own, where the attacker's work takes no time of
theirs: one streams the same greedy completion again and again, the other asks /health at a steady
rate, each time on a new connection. Standard library only, so that they start quickly.
Must not know: what the attack is, how much of it may be seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

HEALTH_PERIOD_S = 0.005
CALM_S = 0.25  # of /health before the attack, which tells how busy the machine is
MIN_SAMPLES = 100  # of /health, however short the attack was
NUM_TOKENS = 24  # of the canary's answer
PATIENCE_S = 60.0  # for one answer


@dataclasses.dataclass(slots=True)
class Seen:
    """What the neighbours saw: answers, and how long /health took in seconds.

    While one request for /health waits no other is sent; those that would have been count too, for
    otherwise a server that stands still for long would show in one number only.
    """

    num_answers: int = 0
    num_different: int = 0  # of the answers, those unlike the one before the attack
    failures: list[str] = dataclasses.field(default_factory=list)
    calm_health_s: list[float] = dataclasses.field(default_factory=list)
    health_s: list[float] = dataclasses.field(default_factory=list)

    def add_health(self, latency_s: float) -> None:
        """Count a request for /health, and those that waited behind it."""
        while latency_s > 0:
            self.health_s.append(latency_s)
            latency_s -= HEALTH_PERIOD_S

    def health_percentile_s(self, percent: float) -> float:
        """Return the latency that so many percent of the /health requests did not exceed."""
        ordered = sorted(self.health_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


class Neighbours:
    """Two threads that use a server at `url` until they are stopped."""

    def __init__(self, url: str, api_key: str) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        self._address = (address.hostname, address.port)
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        self._stopping = threading.Event()
        self.seen = Seen()
        self._usual = self._answer()
        calm_until = time.perf_counter() + CALM_S
        while time.perf_counter() < calm_until:
            self.seen.calm_health_s.append(self._health_s())
            time.sleep(HEALTH_PERIOD_S)

    def run_until(self, stop: threading.Event) -> None:
        """Use the server until `stop` is set."""
        self._stopping = stop
        threads = [
            threading.Thread(target=self._repeat, args=(step,))
            for step in (self._ask_for_an_answer, self._ask_for_health)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _repeat(self, step) -> None:
        while not (self._stopping.is_set() and len(self.seen.health_s) >= MIN_SAMPLES):
            try:
                step()
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.seen.failures.append(f"{step.__name__}: {error!r}")
                self._stopping.wait(0.1)

    def _ask_for_an_answer(self) -> None:
        answer = self._answer()
        self.seen.num_answers += 1
        self.seen.num_different += answer != self._usual

    def _ask_for_health(self) -> None:
        self.seen.add_health(self._health_s())
        self._stopping.wait(HEALTH_PERIOD_S)

    def _health_s(self) -> float:
        """Ask for /health on a new connection; return how long it took."""
        began = time.perf_counter()
        with contextlib.closing(self._connect()) as connection:
            connection.request("GET", "/health")
            response = connection.getresponse()
            response.read()
        assert response.status == 200, response.status
        return time.perf_counter() - began

    def _answer(self) -> str:
        """Return the canary's answer, read as it comes."""
        body = {
            "prompt": "The for statement", "max_tokens": NUM_TOKENS, "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        with contextlib.closing(self._connect()) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
            response = connection.getresponse()
            assert response.status == 200, response.status
            events = [line[6:] for line in response if line.startswith(b"data: ")]
        assert events[-1].strip() == b"[DONE]", events[-1:]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self._address, timeout=PATIENCE_S)


@contextlib.contextmanager
def watched(url: str, api_key: str) -> Iterator[Seen]:
    """Let neighbours use the server meanwhile; yields what they saw, filled in at the end."""
    command = (sys.executable, "-m", "benchmarks.neighbours", url, api_key)
    root = Path(__file__).parents[1]
    seen = Seen()
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "watching\n"
            yield seen
            told, _ = process.communicate("stop\n", timeout=2 * PATIENCE_S)
        finally:
            process.kill()
    for name, value in json.loads(told).items():
        setattr(seen, name, value)


def main(url: str, api_key: str) -> None:
    """Use the server until a line comes in; then print what was seen."""
    neighbours = Neighbours(url, api_key)
    print("watching", flush=True)
    stop = threading.Event()
    user = threading.Thread(target=neighbours.run_until, args=(stop,))
    user.start()
    sys.stdin.readline()
    stop.set()
    user.join()
    print(json.dumps(dataclasses.asdict(neighbours.seen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
