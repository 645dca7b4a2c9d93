"""`fastserve top`: what a server is doing, live in the terminal.

Rules: reads /metrics over HTTP and nothing else, so it works on any server it can reach; rates are
differences between two looks. Must not know: the engine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastserve.config import ConfigError
from fastserve.verb_config import TopConfig

PREFIX = "fastserve:"
BAR_WIDTH = 40
TIMEOUT_S = 5.0
NOT_OURS = "these are not the metrics of a FastServe server"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at a server; `totals` only grow, and `at` is when it was taken, in seconds."""

    at: float
    running: int = 0
    waiting: int = 0
    by_level: Mapping[int, int] = field(default_factory=dict)
    blocks: Mapping[tuple[str, str], int] = field(default_factory=dict)  # by (tier, state)
    totals: Mapping[str, float] = field(default_factory=dict)


def read_snapshot(exposition: str, at: float) -> Snapshot:
    """Take a snapshot out of the text of /metrics.

    Raises ValueError if this is not the text of a FastServe server.
    """
    gauges: dict[str, float] = {}
    totals: dict[str, float] = {}
    by_level: dict[int, int] = {}
    blocks: dict[tuple[str, str], int] = {}
    try:
        families = list(text_string_to_metric_families(exposition))
    except ValueError as error:
        raise ValueError(NOT_OURS) from error
    for family in families:
        for sample in family.samples:
            if not sample.name.startswith(PREFIX):
                continue
            name, labels, value = sample.name.removeprefix(PREFIX), sample.labels, sample.value
            if name == "requests_by_level":
                by_level[int(labels["level"])] = int(value)
            elif name == "kv_blocks":
                blocks[labels["tier"], labels["state"]] = int(value)
            elif name.endswith("_total"):
                totals[name] = totals.get(name, 0.0) + value
            else:
                gauges[name] = value
    if "num_requests_running" not in gauges:
        raise ValueError(NOT_OURS)
    running, waiting = gauges["num_requests_running"], gauges["num_requests_waiting"]
    return Snapshot(at, int(running), int(waiting), by_level, blocks, totals)


def rate(before: Snapshot | None, now: Snapshot, name: str) -> float | None:
    """Return how fast a total grows, a second; None if that cannot be told yet."""
    if before is None or name not in before.totals or now.at <= before.at:
        return None
    return (now.totals[name] - before.totals[name]) / (now.at - before.at)


def picture(url: str, before: Snapshot | None, now: Snapshot) -> RenderableType:
    """Draw one snapshot."""
    return Group(
        Text.assemble(("fastserve top", "bold"), f"  {url}"),
        Text(""),
        _figures(before, now),
        Text("\nrequests by level (0 runs first)", style="bold"),
        _bars({str(level): count for level, count in sorted(now.by_level.items())}),
        Text("\nKV blocks", style="bold"),
        _bars({f"{tier} {state}": count for (tier, state), count in _present(now.blocks).items()}),
    )


def _present(blocks: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Leave out the tiers that have no blocks at all."""
    tiers = {tier for (tier, _), count in blocks.items() if count}
    return {key: count for key, count in blocks.items() if key[0] in tiers}


def _figures(before: Snapshot | None, now: Snapshot) -> Table:
    """Lay out the numbers, two columns of them."""
    table = Table.grid(padding=(0, 3))
    for _ in range(2):
        table.add_column(style="cyan")
        table.add_column(justify="right", min_width=9)
    per_s = [
        None if (value := rate(before, now, name)) is None else f"{value:,.1f}"
        for name in ("generation_tokens_total", "prompt_tokens_total", "num_preemptions_total")
    ]
    decided, counted = (
        rate(before, now, name) for name in ("scheduler_step_seconds_total", "engine_steps_total")
    )
    decision = f"{decided / counted * 1e3:.2f}" if decided is not None and counted else None
    rows: list[tuple[str, str | None, str, str | None]] = [
        ("running", f"{now.running:,}", "output tokens/s", per_s[0]),
        ("waiting", f"{now.waiting:,}", "prompt tokens/s", per_s[1]),
        ("demotions", _total(now, "demotions_total"), "preemptions/s", per_s[2]),
        ("promotions", _total(now, "promotions_total"), "ms to decide a step", decision),
    ]
    for row in rows:
        table.add_row(*("-" if cell is None else cell for cell in row))
    return table


def _total(now: Snapshot, name: str) -> str | None:
    return f"{now.totals[name]:,.0f}" if name in now.totals else None


def _bars(counts: Mapping[str, int]) -> RenderableType:
    """Draw a bar for each count, as a share of their sum."""
    if not counts:
        return Text("none", style="dim")
    whole = max(1, sum(counts.values()))
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", min_width=12, style="cyan")
    table.add_column(justify="right", min_width=7)
    table.add_column(width=BAR_WIDTH)
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", Bar(whole, 0, count, width=BAR_WIDTH, color="green"))
    return table


def look(client: httpx.Client, url: str) -> Snapshot:
    """Ask a server for its metrics.

    Raises ValueError, of one line, if there is no answer or none that can be read.
    """
    try:
        answer = client.get(f"{url}/metrics")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"no server answers at {url}: {error}") from error
    if answer.status_code != httpx.codes.OK:
        raise ValueError(f"{url}/metrics answers {answer.status_code} {answer.reason_phrase}")
    return read_snapshot(answer.text, time.monotonic())


def watch(config: TopConfig) -> int:
    """Draw a server until interrupted; one that goes away may come back."""
    url = config.url.rstrip("/")
    url = url if "://" in url else f"http://{url}"
    with httpx.Client(timeout=TIMEOUT_S) as client:
        try:
            now = look(client, url)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if config.once:
            Console().print(picture(url, None, now))
            return 0
        with Live(picture(url, None, now), screen=sys.stdout.isatty(), auto_refresh=False) as live:
            while True:
                time.sleep(config.interval)  # the rhythm of the picture
                before = now
                try:
                    now = look(client, url)
                except ValueError as error:
                    live.update(Text(f"{error}; still trying", style="red"), refresh=True)
                else:
                    live.update(picture(url, before, now), refresh=True)
