"""What attacks on a live server do to its neighbours: /health, and a canary.

    python -m benchmarks.attacks [--seconds 5] [--attacks "n,a long text"] [--output FILE]

A server of the demo model with default limits is attacked for so many seconds in each way of
attack_kinds.py. Meanwhile a neighbour asks /health all the time, each time on a new connection,
and another asks for the same greedy completion again and again. Latencies of /health count those
requests too that would have been sent while one waited. Memory is the API process', at its highest
during the attack over what it was before.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.attack_kinds import ATTACKS, MIB, TEMPLATE, Attack
from benchmarks.command import command_parser, names_of, origin, run_command
from benchmarks.footprint import footprint
from benchmarks.live_server import LiveServer, live_process
from benchmarks.neighbours import watched
from fastserve.host.provenance import output_path

FLAGS = ("demo", "--num-threads", "1")
SAMPLE_S = 0.01  # of memory


@contextmanager
def highest_memory(pid: int) -> Iterator[Callable[[], int]]:
    """Yield what says how many bytes a process grew by at most."""
    before = peak = footprint(pid).rss_bytes
    is_over = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_over.wait(SAMPLE_S):
            peak = max(peak, footprint(pid).rss_bytes)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield lambda: peak - before
    finally:
        is_over.set()
        sampler.join()


def repeat(server: LiveServer, attack: Attack, seconds: float) -> Counter[str]:
    """Attack for so long, each client at least once; return how the tries ended."""
    ends: list[str] = []
    deadline = time.monotonic() + seconds

    def run() -> None:
        while True:
            ends.append(attack.once(server))
            if time.monotonic() > deadline:
                return

    clients = [threading.Thread(target=run) for _ in range(attack.num_clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return Counter(ends)


def measure(server: LiveServer, attack: Attack, seconds: float) -> dict[str, Any]:
    """Attack, and return what came of it."""
    with highest_memory(server.pid) as grown, watched(server.url, "") as seen:
        began = time.monotonic()
        ends = repeat(server, attack, seconds)
        spent_s = time.monotonic() - began
    return {
        "seconds": round(spent_s, 1),
        "ends": dict(sorted(ends.items())),
        "health_ms": {
            "calm_p50": in_ms(sorted(seen.calm_health_s)[len(seen.calm_health_s) // 2]),
            "p50": in_ms(seen.health_percentile_s(50)),
            "p99": in_ms(seen.health_percentile_s(99)),
            "max": in_ms(max(seen.health_s)),
        },
        "canaries": seen.num_answers,
        "canaries_different": seen.num_different,
        "neighbours_failures": seen.failures,
        "memory_mib": round(grown() / MIB),
    }


def in_ms(seconds: float) -> float:
    """Return seconds as milliseconds, to a tenth."""
    return round(1e3 * seconds, 1)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for what cannot be run."""
    parser = command_parser("attacks", __doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each attack lasts")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="names, with commas")
    parser.add_argument("--output", help="JSON file to write the figures to")
    args = parser.parse_args()
    args.attacks = names_of("--attacks", args.attacks, ATTACKS)
    args.output = None if args.output is None else output_path(args.output)
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Attack one server in all ways, and tell each as it is over."""
    result: dict[str, Any] = {
        **origin("attacks"),
        "load_average_at_start": [round(load, 1) for load in os.getloadavg()],
        "flags": list(FLAGS),
        "attacks": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        template = Path(directory) / "template.jinja"
        template.write_text(TEMPLATE)
        with live_process((*FLAGS, "--chat-template", str(template))) as server:
            for name in args.attacks:
                found = measure(server, ATTACKS[name], args.seconds)
                result["attacks"][name] = found
                print(f"{name:26s} {found}", flush=True)
    result["load_average_at_end"] = [round(load, 1) for load in os.getloadavg()]
    return result


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print what the worst attack did to everybody."""
    worst = max(found["health_ms"]["p99"] for found in result["attacks"].values())
    print(f"/health p99 under the worst attack: {worst} ms")


def main() -> int:
    """Attack, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, run, show)


if __name__ == "__main__":
    sys.exit(main())
