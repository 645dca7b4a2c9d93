"""`fastserve bench serve`: sends requests to a live server and times what comes back.

Rules: an open loop (a request goes out when it is due, whatever became of others) unless
--max-concurrency bounds it; requests that are lost are counted and named, never repeated.
Must not know: how bytes become an answer, the arithmetic of reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvloop
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from fastserve.bench.requests import Planned, body_of, plan_requests, renewed
from fastserve.bench.serve_config import METRICS, ServeBenchConfig
from fastserve.bench.serve_report import Run, Sent, details, figures
from fastserve.bench.stream_client import Answer, Endpoint, LostRequestError, ask
from fastserve.options import ConfigError
from fastserve.provenance import output_path, provenance

HELLO_S = 10.0  # for the server to say which models it has
PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}


class Target:
    """A server, a model of it, and the settings under which it is asked."""

    def __init__(self, config: ServeBenchConfig) -> None:
        self.config = config
        key = config.api_key or os.environ.get("OPENAI_API_KEY")
        headers = (("Authorization", f"Bearer {key}"),) if key else ()
        base = config.base_url or f"http://{config.host}:{config.port}"
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url: {base!r} is not an http:// or https:// address")
        is_tls = parts.scheme == "https"
        self.base_url = base.rstrip("/")
        self.endpoint = Endpoint(
            parts.hostname,
            parts.port or (443 if is_tls else 80),
            parts.path.rstrip("/") + (config.endpoint or PATHS[config.is_chat]),
            is_tls,
            headers,
        )
        self.model = self._greet(config.model)

    def _greet(self, model: str | None) -> str:
        """Return the model asked for, else the server's first.

        Raises ConfigError when the server cannot be reached or does not say which it has.
        """
        url = f"{self.base_url}/v1/models"
        try:
            answer = httpx.get(url, headers=dict(self.endpoint.headers), timeout=HELLO_S)
        except httpx.HTTPError as error:
            raise ConfigError(f"{url}: {error or type(error).__name__}") from error
        if model is not None:
            return model
        try:
            return str(answer.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{url}: {answer.status_code} {answer.text}; no --model") from error

    async def ask(self, request: Planned) -> Answer:
        """Send one request."""
        return await ask(self.endpoint, body_of(request, self.config, self.model))


def measure_serving(config: ServeBenchConfig) -> int:
    """Run the workload, print the figures and write them; 1 when no request was answered."""
    requests = plan_requests(config)
    now = datetime.now()
    path = result_path(config, now)
    target = Target(config)
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, refresh_per_second=1, disable=config.disable_tqdm
    ) as progress:
        run = uvloop.run(run_all(target, requests, progress))
    result = {**heading(target, requests, now), **figures(run, config)}
    for error in sorted({one.error for one in run.sent if one.error is not None})[:5]:
        console.print(f"[red]lost:[/] {error}", highlight=False)
    if has_no_stream(run):
        console.print("[yellow]every answer came in one piece[/]: TTFT and ITL say nothing")
    Console().print(as_table(result, config.percentiles()))
    if path is not None:
        if config.save_detailed:
            result |= details(run)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["completed"] else 1


def result_path(config: ServeBenchConfig, now: datetime) -> Path | None:
    """Return the file to write; None when none is asked for."""
    if config.output is not None:
        return output_path(config.output)
    if not config.save_result:
        return None
    name = config.result_filename
    if name is None:
        concurrency = "" if config.max_concurrency is None else f"-{config.max_concurrency}"
        model = (config.model or "model").rstrip("/").rpartition("/")[2]
        label = config.label or config.backend
        name = f"{label}-{config.request_rate:g}qps{concurrency}-{model}-{now:%Y%m%d-%H%M%S}.json"
    return output_path(str(Path(config.result_dir or ".") / name))


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


async def run_all(target: Target, requests: Sequence[Planned], progress: Progress) -> Run:
    """Warm up, send every request when it is due, then some of them alone.

    Raises ConfigError when a request to warm up is lost: so would all others be.
    """
    config = target.config
    rng = random.Random(config.seed + 2)
    extra = [requests[index % len(requests)] for index in range(config.num_warmups)]
    warmups = [renewed(request, config, rng)._replace(due_s=0.0) for request in extra]
    if warmups:
        task = progress.add_task("warming up", total=len(warmups))
        lost = [s for s in await send(target, warmups, lambda: progress.advance(task)) if s.error]
        if lost:
            raise ConfigError(f"{target.base_url}: {lost[0].error}")
    task = progress.add_task("requests", total=len(requests))
    started, cpu = time.perf_counter(), time.process_time()
    sent = await send(target, requests, lambda: progress.advance(task))
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    whole = [index for index, one in enumerate(sent) if one.answer is not None]
    chosen = evenly(whole, config.measure_alone)
    task = progress.add_task("alone", total=len(chosen), visible=bool(chosen))
    slowdowns = []
    for index in chosen:
        request = renewed(requests[index], config, rng)._replace(due_s=0.0)
        [alone] = await send(target, [request], lambda: progress.advance(task))
        if alone.answer is not None:
            slowdowns.append(sent[index].jct / alone.jct)
    return Run(sent, seconds, cpu_s, slowdowns)


async def send(
    target: Target, requests: Sequence[Planned], on_done: Callable[[], None]
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
                return Sent(due, await target.ask(request))
            except (LostRequestError, OSError) as error:
                return Sent(due, None, str(error) or type(error).__name__)
            finally:
                on_done()

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
    table = Table(
        title=f"{result['model_id']}: {result['completed']} requests in {result['duration']:.1f} s"
        + (f", {result['failed']} lost" if result["failed"] else ""),
        caption=f"{result['request_throughput']:,.2f} requests/s, "
        f"{result['output_throughput']:,.1f} output tokens/s, "
        f"{result['total_token_throughput']:,.1f} tokens/s; "
        f"the client took {result['client_cpu_share']:.0%} of a core",
    )
    rows = [(name.upper(), f"{name}_ms") for name in METRICS]
    rows += [("normalized", "norm_latency_ms"), ("JCT, s", "jct_s"), ("slowdown", "slowdown")]
    kinds = [f"p{percent:g}" for percent in percents]
    for heading in ("ms", "mean", "median", *kinds):
        table.add_column(heading, justify="right")
    for title, name in rows:
        median = result.get(f"median_{name}", result.get(f"p50_{name}"))
        cells = [result[f"mean_{name}"], median, *(result.get(f"{kind}_{name}") for kind in kinds)]
        if any(cell is not None for cell in cells):
            table.add_row(title, *("" if cell is None else f"{cell:,.3f}" for cell in cells))
    return table
