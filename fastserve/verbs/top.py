"""`fastserve top`: what a server is doing, live in the terminal.

Rules: reads /metrics over HTTP and nothing else, so it works on any server it can reach; rates are
differences between two looks. Where the output is no terminal, one picture follows the other.
Must not know: the engine.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from email.utils import parsedate_to_datetime

import httpx
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastserve.host.http_client import open_client
from fastserve.settings.option import ConfigError
from fastserve.settings.server import KEY_VARIABLE
from fastserve.verbs.config import TopConfig
from fastserve.verbs.server_snapshot import Snapshot, rate, read_snapshot

BAR_WIDTH = 40
BESIDE_BARS = 25  # columns of a bar's name and number
SIDE_BY_SIDE = 64  # columns that two columns of figures need
TIMEOUT_S = 5.0
Row = tuple[str, str | None, str, str | None]
"""Two names and their figures; None: not known yet."""
HEIGHTS = " ▁▂▃▄▅▆▇█"  # of a decile; half of it: a tenth of the answers


def picture(
    url: str, before: Snapshot | None, now: Snapshot, *, uptime_s: float | None = None, width: int
) -> RenderableType:
    """Draw one snapshot for a terminal of `width` columns."""
    head = [Text.assemble(("fastserve top", "bold"), f"  {url}")]
    about = [("model", now.model_name)] if now.model_name else []
    if uptime_s is not None:
        about.append(("up", duration(uptime_s)))
    if len(now.replicas) > 1 and now.num_serving is not None:
        about.append(("replicas", f"{now.num_serving} of {len(now.replicas)} serve"))
    head += [Text.assemble((name, "cyan"), f" {value}") for name, value in about]
    if not now.is_loaded:
        return Group(*head, Text("\nthe model is loading", style="yellow"))
    is_wide = width >= SIDE_BY_SIDE
    return Group(
        *head,
        Text(""),
        _figures(before, now, 2 if is_wide else 1),
        *_replicas(before, now),
        *_deciles(now.by_decile, "answers by predicted decile" if is_wide else "deciles"),
        *_queues(now, width),
        Text("\nKV blocks", style="bold"),
        *(_bars(counts, width) for counts in _by_tier(now.blocks)),
    )


def _queues(now: Snapshot, width: int) -> list[RenderableType]:
    """Draw where requests stand: by what is expected of them, else by level."""
    if now.by_work:
        title = "requests by machine seconds left"
        counts = {f"{seconds} s": count for seconds, count in now.by_work.items()}
    else:
        title = "requests by level (0 runs first)"
        counts = {str(level): count for level, count in sorted(now.by_level.items())}
    return [Text(f"\n{title}", style="bold"), _bars(counts, width)]


def _replicas(before: Snapshot | None, now: Snapshot) -> list[RenderableType]:
    """Lay out what each engine does, where there are several; a dash before it has loaded."""
    if len(now.replicas) < 2:
        return []
    table = Table.grid(padding=(0, 2))
    for name in ("", "run", "wait", "KV", "tok/s", "died"):
        table.add_column(name, justify="right", style=None if name else "cyan")
    table.add_row("replica", "run", "wait", "KV", "tok/s", "died", style="cyan")
    for number, replica in sorted(now.replicas.items()):
        earlier = None if before is None else before.replicas.get(number)
        seconds = 0.0 if before is None else now.at - before.at
        per_s = None
        if earlier is not None and seconds > 0.0:
            per_s = (replica.generated - earlier.generated) / seconds
        cells = (
            f"{replica.running:,}",
            f"{replica.waiting:,}",
            f"{replica.kv_share * 100:.0f} %",
            "-" if per_s is None else f"{per_s:,.1f}",
        )
        shown = cells if replica.is_loaded else ("-",) * len(cells)
        table.add_row(str(number), *shown, f"{replica.restarts:,}")
    return [Text(""), table]


def _deciles(answers: Mapping[int, int], name: str) -> list[Text]:
    """Draw which tenths of predictions answers fell into, and the least and largest share.

    Where predictions are right all are at half height.
    """
    num_answers = sum(answers.values())
    if not num_answers:
        return []
    shares = [count / num_answers for _, count in sorted(answers.items())]
    full = 2.0 / len(shares)
    top = len(HEIGHTS) - 1
    bar = "".join(HEIGHTS[min(round(share / full * top), top)] for share in shares)
    bounds = f"{min(shares) * 100:.0f}-{max(shares) * 100:.0f} %"
    return [Text.assemble((name, "cyan"), "  ", (bar, "green"), f"  {bounds}")]


def duration(seconds: float) -> str:
    """Write a length of time: 0:01:05, or 2 days, 3:04:05."""
    return str(timedelta(seconds=int(seconds)))


def _by_tier(blocks: Mapping[tuple[str, str], int]) -> list[dict[str, int]]:
    """Return the named counts of each tier that has blocks at all."""
    tiers: dict[str, dict[str, int]] = {}
    for (tier, state), count in blocks.items():
        tiers.setdefault(tier, {})[f"{tier} {state}"] = count
    return [counts for counts in tiers.values() if any(counts.values())] or [{}]


def _figures(before: Snapshot | None, now: Snapshot, num_columns: int) -> Table:
    """Lay out the numbers, in one column or two."""
    table = Table.grid(padding=(0, 3))
    for _ in range(num_columns):
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
    rows: list[Row] = [
        ("running", f"{now.running:,}", "output tokens/s", per_s[0]),
        ("waiting", f"{now.waiting:,}", "prompt tokens/s", per_s[1]),
        ("demotions", _total(now, "demotions_total"), "preemptions/s", per_s[2]),
        ("promotions", _total(now, "promotions_total"), "ms to decide a step", decision),
        ("prompts cached", _cached(now), "recomputed", _total(now, "recomputed_tokens_total")),
    ]
    if now.work_s is not None and now.mean_work_s is not None:
        rows += [
            ("expected work, s", f"{now.work_s:,.1f}", "predicted/answered", _bias(now)),
            ("at arrivals, s", f"{now.mean_work_s:,.1f}", "answers", f"{_num_answers(now):,}"),
        ]
    if "swaps_total" in now.totals:
        rows += _link(before, now)
    pairs = [(row[0], row[1]) for row in rows] + [(row[2], row[3]) for row in rows]
    for cells in rows if num_columns == 2 else pairs:
        table.add_row(*("-" if cell is None else cell for cell in cells))
    return table


def _link(before: Snapshot | None, now: Snapshot) -> list[Row]:
    """Return what moves between the tiers, and how much of the time nothing can run but for it."""
    out, back = (
        None if (value := rate(before, now, f"swap_{way}_bytes_total")) is None else value / 1e6
        for way in ("out", "in")
    )
    waited = rate(before, now, "copy_wait_seconds_total")
    return [
        (
            "to the host, MB/s",
            None if out is None else f"{out:,.1f}",
            "back, MB/s",
            None if back is None else f"{back:,.1f}",
        ),
        (
            "swaps",
            _total(now, "swaps_total"),
            "waits for copies",
            None if waited is None else f"{waited * 100:.1f} %",
        ),
    ]


def _total(now: Snapshot, name: str) -> str | None:
    return f"{now.totals[name]:,.0f}" if name in now.totals else None


def _cached(now: Snapshot) -> str | None:
    """Return the share of prompt tokens whose KV was there already."""
    hits, queries = (now.totals.get(f"prefix_cache_{name}_total") for name in ("hits", "queries"))
    return f"{hits / queries * 100:.0f} %" if hits is not None and queries else None


def _num_answers(now: Snapshot) -> int:
    return sum(now.by_decile.values())


def _bias(now: Snapshot) -> str | None:
    """Return the tokens predicted of answers over those that they came to."""
    predicted, answered = (
        now.totals.get(f"{name}_tokens_total") for name in ("predicted_output", "answered")
    )
    return f"{predicted / answered:.2f}" if predicted is not None and answered else None


def _bars(counts: Mapping[str, int], width: int) -> RenderableType:
    """Draw a bar for each count, as a share of their sum."""
    if not counts:
        return Text("none", style="dim")
    whole = max(1, sum(counts.values()))
    bar_width = max(1, min(BAR_WIDTH, width - BESIDE_BARS))
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", min_width=12, style="cyan")
    table.add_column(justify="right", min_width=7)
    table.add_column(width=bar_width)
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", Bar(whole, 0, count, width=bar_width, color="green"))
    return table


class Watched:
    """A server that is looked at again and again, and drawn."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url = url
        self._client = client
        self._before: Snapshot | None = None
        self._now: Snapshot | None = None
        self._uptime_s: float | None = None

    def look(self) -> None:
        """Take a snapshot.

        Raises ValueError, of one line, if there is no answer or none that can be read.
        """
        try:
            answer = self._client.get(f"{self.url}/metrics")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"no server answers at {self.url}: {reason}") from error
        if answer.status_code != httpx.codes.OK:
            said = f"{answer.status_code} {answer.reason_phrase}"
            hint = "; --api-key shows one" if answer.status_code == httpx.codes.UNAUTHORIZED else ""
            raise ValueError(f"{self.url}/metrics answers {said}{hint}")
        now = read_snapshot(answer.text, time.monotonic())
        self._before, self._now = self._now, now
        if now.started_at is not None:
            self._uptime_s = max(0.0, clock_of(answer) - now.started_at)

    def picture(self, width: int) -> RenderableType:
        """Draw what was seen last."""
        assert self._now is not None
        return picture(self.url, self._before, self._now, uptime_s=self._uptime_s, width=width)


def clock_of(answer: httpx.Response) -> float:
    """Return the server's Unix time, which may be another than this machine's."""
    try:
        return parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return time.time()


def watch(config: TopConfig) -> int:
    """Draw a server until interrupted; one that goes away may come back."""
    url = config.url.rstrip("/")
    url = url if "://" in url else f"http://{url}"
    console = Console()
    with open_client(url, timeout_s=TIMEOUT_S) as client:
        if key := config.api_key or next(iter(os.environ.get(KEY_VARIABLE, "").split()), None):
            client.headers["Authorization"] = f"Bearer {key}"
        watched = Watched(url, client)
        try:
            watched.look()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if config.once:
            console.print(watched.picture(console.width))
            return 0
        with shown(console) as show:
            show(watched.picture(console.width))
            while True:
                time.sleep(config.interval)  # the rhythm of the picture
                try:
                    watched.look()
                except ValueError as error:
                    show(Text(f"{error}; still trying", style="red"))
                else:
                    show(watched.picture(console.width))


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    """Yield what puts a picture in the place of the last, or below it where that cannot be."""
    if not console.is_terminal:
        yield console.print
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda drawn: live.update(drawn, refresh=True)
