"""`fastserve bench serve`: sends requests to a live server and times what comes back.

Rules: an open loop (a request goes out when it is due, whatever became of others) unless
--max-concurrency bounds it; requests that are lost are counted and named, never repeated.
Must not know: how bytes become an answer, the arithmetic of reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvloop
from rich.console import Console
from rich.table import Table

from fastserve.bench.meter import Meter
from fastserve.bench.requests import Planned, body_of, plan_requests, renewed
from fastserve.bench.serve_config import METRICS, ServeBenchConfig
from fastserve.bench.serve_report import Run, Sent, details, figures
from fastserve.bench.stream_client import Answer, Endpoint, LostRequestError, ask, message_of
from fastserve.host.http_client import open_client
from fastserve.host.provenance import output_path, provenance, write_result
from fastserve.host.terminal import make_table, print_table, say
from fastserve.settings.option import ConfigError

HELLO_S = 10.0  # for the server to say which models it has
PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}


class Target:
    """A server, a model of it, and the settings under which it is asked."""

    def __init__(self, config: ServeBenchConfig) -> None:
        self.config = config
        key = config.api_key or os.environ.get("OPENAI_API_KEY")
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError("--api-key: a key is plain ASCII")
        headers = (("Authorization", f"Bearer {key}"),) if key else ()
        host = f"[{config.host}]" if ":" in config.host else config.host
        base = config.base_url or f"http://{host}:{config.port}"
        try:
            parts = urlsplit(base)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--base-url: {base!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url: {base!r} is not an http:// or https:// address")
        is_tls = parts.scheme == "https"
        self.base_url = base.rstrip("/")
        self.endpoint = Endpoint(
            parts.hostname,
            port or (443 if is_tls else 80),
            parts.path.rstrip("/") + (config.endpoint or PATHS[config.is_chat]),
            is_tls,
            headers,
        )
        self.model, self.window = self._greet()

    def _greet(self) -> tuple[str, int | None]:
        """Return the model asked for, else the server's first, and its window where it says so.

        Raises ConfigError when the server cannot be reached, refuses the key, has another model or
        is not ready.
        """
        url, model = f"{self.base_url}/v1/models", self.config.model
        headers = dict(self.endpoint.headers)
        try:
            # Directly, as requests go.
            with open_client(url, timeout_s=HELLO_S, is_direct=True) as client:
                answer = client.get(url, headers=headers)
        except httpx.HTTPError as error:
            raise ConfigError(f"{url}: {str(error) or type(error).__name__}") from error
        said = f"{url}: {answer.status_code}: {message_of(answer.content)}"
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ConfigError(f"{said} (--api-key, or the variable OPENAI_API_KEY)")
        try:
            cards = {str(card["id"]): card for card in answer.json()["data"]}
            model = model or next(iter(cards))
        except (ValueError, LookupError, TypeError, StopIteration) as error:
            if model is not None:
                return model, None
            raise ConfigError(f"{said}; name one with --model") from error
        if model not in cards:
            raise ConfigError(f"--model: {url} has no {model!r}; it has: {', '.join(cards)}")
        window = cards[model].get("max_model_len")
        if window is None and cards[model].get("owned_by") == "fastserve":
            raise ConfigError(f"{self.base_url}: {model} is still loading")
        return model, window

    async def ask(self, request: Planned, on_piece: Callable[[], None]) -> Answer:
        """Send one request."""
        return await ask(self.endpoint, body_of(request, self.config, self.model), on_piece)


def measure_serving(config: ServeBenchConfig) -> int:
    """Run the workload, print the figures and write them; 1 when no request was answered."""
    now = datetime.now()
    path = result_path(config, now)
    target = Target(config)
    requests = plan_requests(config, target.window)
    say(f"{described(requests)} to {target.model} at {target.base_url}")
    with Meter(Console(stderr=True), is_shown=not config.disable_tqdm) as meter:
        run = uvloop.run(run_all(target, requests, meter))
    result = {**heading(target, requests, now), **figures(run, config)}
    if path is not None:
        write_result(path, {**result, **(details(run) if config.save_detailed else {})})
    errors = [one.error for one in run.sent if one.error is not None]
    if not result["completed"]:
        say(f"fastserve: error: all {len(errors)} requests were lost: {errors[0]}")
        return 1
    for error, count in Counter(errors).most_common(5):
        say(f"{count} lost: {error}", style="red")
    if has_no_stream(run):
        say("every answer came in one piece: TTFT and ITL say nothing", style="yellow")
    print_table(as_table(result, config.percentiles()))
    say(rates(result), stderr=False)
    return 0


def described(requests: Sequence[Planned]) -> str:
    """Say in a line what is sent: how many requests, their mean lengths, over what time."""
    inputs = statistics.fmean(len(request.prompt_token_ids) for request in requests)
    outputs = statistics.fmean(request.num_output_tokens for request in requests)
    count = f"{len(requests):,} request" + "s" * (len(requests) > 1)
    over = f"over {requests[-1].due_s:,.1f} s" if requests[-1].due_s else "at once"
    return f"{count} of {inputs:,.0f} + {outputs:,.0f} tokens {over}"


def result_path(config: ServeBenchConfig, now: datetime) -> Path | None:
    """Return the file to write; None when none is asked for."""
    if config.output is not None:
        return output_path(config.output)
    if not config.save_result:
        return None
    flag = "--result-dir" if config.result_filename is None else "--result-filename"
    name = config.result_filename
    if name is None:
        concurrency = "" if config.max_concurrency is None else f"-{config.max_concurrency}"
        model = (config.model or "model").rstrip("/").rpartition("/")[2]
        label = config.label or config.backend
        name = f"{label}-{config.request_rate:g}qps{concurrency}-{model}-{now:%Y%m%d-%H%M%S}.json"
    return output_path(str(Path(config.result_dir or ".") / name), flag)


def heading(target: Target, requests: Sequence[Planned], now: datetime) -> dict[str, Any]:
    """Return what names a run."""
    config = target.config
    is_unbounded = config.request_rate == float("inf")
    return {
        "date": f"{now:%Y%m%d-%H%M%S}",
        "backend": config.backend,
        "endpoint_type": config.backend,
        "label": config.label,
        "model_id": target.model,
        "num_prompts": len(requests),
        "request_rate": "inf" if is_unbounded else config.request_rate,
        "burstiness": config.burstiness,
        "max_concurrency": config.max_concurrency,
        **provenance(["fastserve", *sys.argv[1:]]),
    }


async def run_all(target: Target, requests: Sequence[Planned], meter: Meter) -> Run:
    """Warm up, send every request when it is due, then some of them alone.

    Raises ConfigError when a request to warm up is lost: so would all others be.
    """
    config = target.config
    rng = random.Random(config.seed + 2)
    extra = [requests[index % len(requests)] for index in range(config.num_warmups)]
    warmups = [renewed(request, config, rng)._replace(due_s=0.0) for request in extra]
    if warmups:
        with meter.following("warming up", warmups):
            answers = await send(target, warmups, meter.count_done, meter.count_piece)
        lost = [one.error for one in answers if one.error]
        if lost:
            raise ConfigError(f"{target.base_url}: {lost[0]}")
    with meter.following("requests", requests):
        started, cpu = time.perf_counter(), time.process_time()
        sent = await send(target, requests, meter.count_done, meter.count_piece)
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    whole = [index for index, one in enumerate(sent) if one.answer is not None]
    chosen = evenly(whole, config.measure_alone)
    again = [renewed(requests[index], config, rng)._replace(due_s=0.0) for index in chosen]
    slowdowns = []
    with meter.following("alone", again):
        for index, request in zip(chosen, again, strict=True):
            [alone] = await send(target, [request], meter.count_done, meter.count_piece)
            if alone.answer is not None:
                slowdowns.append(sent[index].jct / alone.jct)
    return Run(sent, seconds, cpu_s, slowdowns)


async def send(
    target: Target,
    requests: Sequence[Planned],
    on_done: Callable[[], None] = lambda: None,
    on_piece: Callable[[], None] = lambda: None,
) -> list[Sent]:
    """Send every request when it is due and wait for every answer."""
    limit = target.config.max_concurrency
    places: contextlib.AbstractAsyncContextManager[object] = (
        contextlib.nullcontext() if limit is None else asyncio.Semaphore(limit)
    )

    async def one(request: Planned, due: float) -> Sent:
        async with places:
            if limit is not None:
                due = max(due, time.perf_counter())
            try:
                sent = Sent(due, await target.ask(request, on_piece))
            except (LostRequestError, OSError) as error:
                sent = Sent(due, None, str(error) or type(error).__name__)
            on_done()
            return sent

    start = time.perf_counter()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for request in requests:
            due = start + request.due_s
            if (wait_s := due - time.perf_counter()) > 0.0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(one(request, due)))
    return [task.result() for task in tasks]


def evenly(indices: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of them, spread over all."""
    count = min(count, len(indices))
    return [indices[k * len(indices) // count] for k in range(count)]


def has_no_stream(run: Run) -> bool:
    """Whether no answer of several tokens came in several pieces."""
    answers = [one.answer for one in run.sent if one.answer and one.answer.output_tokens > 1]
    return bool(answers) and all(len(answer.piece_times) == 1 for answer in answers)


def as_table(result: Mapping[str, Any], percents: Sequence[float]) -> Table:
    """Lay the figures out for people: mean, median and the percentiles asked for."""
    kinds = [f"p{percent:g}" for percent in percents]
    table = make_table(
        "ms",
        "mean",
        "median",
        *kinds,
        title=f"{result['model_id']}: {result['completed']} requests in {result['duration']:.1f} s"
        + (f", {result['failed']} lost" if result["failed"] else ""),
    )
    rows = [(name.upper(), f"{name}_ms") for name in METRICS]
    rows += [("normalized", "norm_latency_ms"), ("JCT, s", "jct_s"), ("slowdown", "slowdown")]
    for title, name in rows:
        median = result.get(f"median_{name}", result.get(f"p50_{name}"))
        cells = [result[f"mean_{name}"], median, *(result.get(f"{kind}_{name}") for kind in kinds)]
        if any(cell is not None for cell in cells):
            table.add_row(title, *("" if cell is None else readable(cell) for cell in cells))
    return table


def rates(result: Mapping[str, Any]) -> str:
    """Return what the server and the client did in a second, in a line."""
    return (
        f"{result['request_throughput']:,.2f} requests/s, "
        f"{result['output_throughput']:,.1f} output tokens/s, "
        f"{result['total_token_throughput']:,.1f} tokens/s; "
        f"the client took {result['client_cpu_share']:.0%} of a core"
    )


def readable(value: float) -> str:
    """Write four digits of a figure, or all before the point."""
    decimals = max(0, min(3, 3 - math.floor(math.log10(value)))) if value > 0 else 0
    return f"{value:,.{decimals}f}"
