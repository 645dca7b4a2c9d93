"""What every experiment needs: points, a pool that runs them once, JSON and pictures.

    lab = Lab(is_quick=False)
    setup = Setup("opt-13b", "a100-40g", max_num_seqs=16)
    points = [Point({"policy": "fcfs", "rate": 1.0, "seed": 0}, setup.config("fcfs"),
                    setup.machine(), lengths.arriving(1.0, seed=0))]
    results = lab.run("e2_rate", points)
    lab.save("e2_rate", settings={…}, figures={…}, picture=figure)

An experiment is a file experiments/eN_name.py with `run(lab)`; `fastserve reproduce` finds it. A
point is cached under a hash of its settings, its workload and the code that simulates, so an
interrupted run goes on where it stopped, and no figure outlives the code that made it.
Must not know: which experiments there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastserve.host.cache_dir import cache_dir
from fastserve.host.provenance import ROOT, provenance
from fastserve.settings.scheduler import SchedulerConfig, pool_window
from fastserve.sim.hardware import HardwareFit, resolve_cost_model
from fastserve.sim.replicas import simulate_replicas
from fastserve.sim.report import alone_s, latencies, make_report
from fastserve.sim.sim_executor import EOS_TOKEN_ID
from fastserve.sim.simulator import Machine, simulate
from fastserve.sim.workload import Workload

NICENESS = 10
BLOCK_SIZE = 16
SWAP_SPACE_GIB = 64.0  # per device: half of what a host of eight A100s has for each
TOKENS_PER_S = 150_000
"""Answer tokens that one core simulates in a second, for the estimate; fewer where plans thrash."""
SIMULATING_CODE = ("settings/*.py", "core/**/*.py", "engine/engine.py", "sim/*.py", "sim/*.json")
Labels = Mapping[str, str | float | int]


@dataclass(frozen=True, slots=True)
class Setup:
    """A model on devices, served as the paper's system does: no chunking, no prefix cache.

    `swap_space` is in GiB of host memory per device, `swap_bandwidth` in GB/s of each direction of
    its link (the hardware's). `scheduler` are further SchedulerConfig fields.
    """

    model: str
    hardware: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_num_seqs: int = 16
    num_device_blocks: int | None = None
    swap_space: float = SWAP_SPACE_GIB
    swap_bandwidth: float | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    def fit(self) -> HardwareFit:
        """Return costs and sizes."""
        return resolve_cost_model(
            self.model,
            self.hardware,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            num_device_blocks=self.num_device_blocks,
            swap_bandwidth=self.swap_bandwidth,
        )

    def machine(self) -> Machine:
        """Return costs and the two tiers of KV."""
        fit = self.fit()
        return Machine(
            cost_model=fit.cost_model,
            num_device_blocks=fit.num_device_blocks,
            num_host_blocks=fit.num_host_blocks(self.swap_space),
            block_bytes=fit.block_bytes,
        )

    def config(self, policy: str, mode: str = "recompute", **changes: Any) -> SchedulerConfig:
        """Return the scheduler's settings under a policy; `changes` win over `scheduler`."""
        fit = self.fit()
        window = pool_window(fit.max_model_len, fit.num_device_blocks, BLOCK_SIZE)
        values: dict[str, Any] = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": max(window, 2048),
            "max_model_len": window,
            "block_size": BLOCK_SIZE,
            "enable_chunked_prefill": False,
            "enable_prefix_caching": False,
            "num_slots": self.pipeline_parallel_size,
            "eos_token_ids": frozenset({EOS_TOKEN_ID}),
            "is_strict": True,
        }
        values |= {**self.scheduler, **changes}
        return SchedulerConfig(scheduling_policy=policy, preemption_mode=mode, **values)

    def describe(self) -> dict[str, Any]:
        """Return everything a figure depends on but policy and workload."""
        scheduler = dataclasses.asdict(self.config("-"))
        for name in ("scheduling_policy", "preemption_mode", "eos_token_ids"):
            del scheduler[name]
        return {
            **{name: getattr(self, name) for name in ("model", "hardware", "tensor_parallel_size",
                                                      "pipeline_parallel_size", "swap_space")},
            **dataclasses.asdict(self.machine()),
            "scheduler": scheduler,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """One simulation; `labels` say which one it is in tables and have no effect.

    `num_replicas` machines are behind the router; with `is_parallel` the slots of one scheduler are
    machines beside each other.
    """

    labels: Labels
    config: SchedulerConfig
    machine: Machine
    workload: Workload
    is_closed_loop: bool = False
    num_replicas: int = 1
    is_parallel: bool = False

    def key(self, code: str) -> str:
        """Return the hash of everything that the result depends on."""
        digest = hashlib.sha256(code.encode())
        config = dataclasses.asdict(self.config)
        config["eos_token_ids"] = sorted(config["eos_token_ids"])
        settings = (
            config,
            dataclasses.asdict(self.machine),
            self.is_closed_loop,
            self.num_replicas,
            self.is_parallel,
        )
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for spec in dataclasses.fields(self.workload):
            column = getattr(self.workload, spec.name)
            content = column.tobytes() if isinstance(column, np.ndarray) else repr(column).encode()
            digest.update(spec.name.encode() + content)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Result:
    """What a point came to: the simulator's report, and the latencies of each row by name."""

    labels: Labels
    report: Mapping[str, Any]
    rows: Mapping[str, Sequence[float]]

    def matches(self, labels: Labels) -> bool:
        """Whether the point has all of these labels."""
        return all(self.labels.get(name) == value for name, value in labels.items())

    def share_within(self, slowdown: float) -> float:
        """Return the share of requests that took at most so many times their time alone."""
        return float(np.mean(np.array(self.rows["slowdown"]) <= slowdown))


def simulate_point(point: Point) -> dict[str, Any]:
    """Run one point here and return what is cached of it."""
    config, machine, workload = point.config, point.machine, point.workload
    is_closed_loop = point.is_closed_loop
    if point.num_replicas > 1:
        outcome = simulate_replicas(
            config, machine, workload, point.num_replicas, is_closed_loop=is_closed_loop
        )
    else:
        outcome = simulate(
            config,
            machine,
            workload,
            is_closed_loop=is_closed_loop,
            is_parallel=point.is_parallel,
        )
    report = make_report(
        outcome, workload, config, machine, settings={}, wall_s=0.0, journal_sha256=None
    )
    rows = latencies(outcome, workload, alone_s(config, machine, workload))
    rounded = {name: [float(f"{value:.6g}") for value in values.tolist()]
               for name, values in rows.items()}  # fmt: skip
    return {"report": report | {"steps": outcome.num_steps}, "rows": rounded}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """Where experiments run. Quick ones check that everything works; their figures mean nothing."""

    is_quick: bool = False
    traces: Path | None = None
    output: Path = ROOT / "results"
    num_workers: int = 2
    command: Sequence[str] = ("fastserve", "reproduce")
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def seeds(self, count: int = 3) -> range:
        """Return the seeds of repetitions: one in a quick run."""
        return range(1 if self.is_quick else count)

    def sized(self, full: int, quick: int = 20) -> int:
        """Return how many requests a point has."""
        return min(full, quick) if self.is_quick else full

    def some(self, values: Sequence[Any], quick: int = 2) -> list[Any]:
        """Return a grid: its first and last values in a quick run."""
        if not self.is_quick or len(values) <= quick:
            return list(values)
        return [*values[: quick - 1], values[-1]]

    def run(self, title: str, points: Sequence[Point]) -> list[Result]:
        """Run the points that are not in the cache, and return all in order."""
        folder = cache_folder()
        code = code_hash()
        files = [folder / f"{point.key(code)}.json" for point in points]
        missing = {file: point for file, point in zip(files, points, strict=True)
                   if not file.exists()}  # fmt: skip
        tokens = sum(int(point.workload.output_tokens.sum()) for point in missing.values())
        minutes = tokens / TOKENS_PER_S / 60
        self.console.print(
            f"{title}: {len(points)} points, {len(missing)} to simulate, "
            f"about {minutes:.1f} CPU-minutes"
        )
        with self._progress(title, len(missing)) as advance:
            for file, cached in self._simulate(missing):
                _write(file, json.dumps(cached))
                advance()
        read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return [Result(point.labels, cached["report"], cached["rows"])
                for point, cached in zip(points, read, strict=True)]  # fmt: skip

    def _simulate(self, points: Mapping[Path, Point]) -> Iterator[tuple[Path, dict[str, Any]]]:
        if self.num_workers == 1 or len(points) < 2:
            for file, point in points.items():
                yield file, simulate_point(point)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.num_workers, context, _start_worker) as pool:
            running = {pool.submit(simulate_point, point): file for file, point in points.items()}
            try:
                for future in as_completed(running):
                    yield running[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @contextlib.contextmanager
    def _progress(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn())  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda: progress.update(task, advance=1)

    def save(
        self,
        name: str,
        *,
        settings: Mapping[str, Any],
        figures: Mapping[str, Any],
        picture: Figure | None = None,
    ) -> None:
        """Write NAME.json and NAME.png; `settings` hold every flag, the arrivals and the seeds."""
        self.output.mkdir(parents=True, exist_ok=True)
        whole = {
            "provenance": provenance(self.command) | {"simulator": code_hash()[:16]},
            "is_quick": self.is_quick,
            "settings": settings,
            "figures": _rounded(figures),
        }
        text = json.dumps(whole, indent=1) + "\n"
        (self.output / f"{name}.json").write_text(text, encoding="utf-8")
        if picture is not None:
            FigureCanvasAgg(picture)
            picture.savefig(self.output / f"{name}.png", dpi=100, metadata={"Software": None})
        self.console.print(f"{name}: written to {self.output}")


def _start_worker() -> None:
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer


def cache_folder() -> Path:
    """Return where points are kept; it may be deleted at any time."""
    folder = cache_dir() / "experiments"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def code_hash() -> str:
    """Return a hash of the code and data that decide what a simulation comes to."""
    digest = hashlib.sha256(simulate_point.__code__.co_code)
    for pattern in SIMULATING_CODE:
        for file in sorted((ROOT / "fastserve").glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(file: Path, text: str) -> None:
    """Write at once or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:
        part.write(text)
    os.replace(part.name, file)


def _rounded(value: Any) -> Any:
    """Return figures of five digits; what does not exist is null."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
