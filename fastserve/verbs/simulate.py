"""`fastserve simulate`: what a policy would do with a trace on some hardware, in virtual time.

Rules: everything is resolved and every output file is opened for writing before the first step, so
that a mistake costs no time; policies that are compared run side by side, one per core. Must not
know: torch, how the simulation works.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastserve.host.machine import num_cores
from fastserve.host.provenance import output_path, provenance, write_result
from fastserve.host.terminal import make_bar, make_table, print_table, say
from fastserve.settings.option import ConfigError
from fastserve.settings.scheduler import SchedulerConfig, StepLimits, pool_window
from fastserve.sim.config import SIMULATED_POLICIES, SimulateConfig
from fastserve.sim.generators import EXAMPLE_MEDIAN, EXAMPLE_RATE, arrivals, example, jittered
from fastserve.sim.hardware import HardwareFit, resolve_cost_model
from fastserve.sim.job import Job, JobResult, run_job, run_side_by_side
from fastserve.sim.plot import plot_runs
from fastserve.sim.sim_executor import EOS_TOKEN_ID, StepOverhead
from fastserve.sim.simulator import Machine
from fastserve.sim.trace_file import read_trace
from fastserve.sim.workload import HASH_ID_TOKENS, Workload

ROWS = (
    ("JCT, s: mean", "jct_s", "mean"),
    ("median", "jct_s", "p50"),
    ("P95", "jct_s", "p95"),
    ("P99", "jct_s", "p99"),
    ("normalized latency, s/token: mean", "normalized_latency_s", "mean"),
    ("P95", "normalized_latency_s", "p95"),
    ("TTFT, s: mean", "ttft_s", "mean"),
    ("P99", "ttft_s", "p99"),
    ("TPOT, s: mean", "tpot_s", "mean"),
    ("longest token gap, s: P99", "max_gap_s", "p99"),
    ("slowdown: median", "slowdown", "p50"),
    ("P99", "slowdown", "p99"),
)
COUNTS = (
    ("preemptions", "preemptions"),
    ("bytes of KV to the host", "swap_out_bytes"),
    ("bytes of KV back", "swap_in_bytes"),
    ("tokens recomputed", "recomputed_tokens"),
    ("most requests with KV", "peak_live_requests"),
)
NUM_EXAMPLES = 500
NOT_SETTINGS = ("compare", "scheduling_policy", "output", "plot", "trace_events", "journal")


def simulate(config: SimulateConfig) -> int:
    """Run the policies asked for; print them, write them to the files asked for."""
    policies = chosen_policies(config)
    refuse_pictures_of_several(config)
    output = _path("--output", config.output)
    plot = _path("--plot", config.plot)
    jobs = make_jobs(config, policies)
    _print_sources(config, jobs[0])
    try:
        results = run_all(jobs)
    except OSError as error:  # of a journal or of trace events, which are written as it runs
        raise ConfigError(f"the files of the run cannot be written: {error}") from error
    print_table(as_table(config, results))
    if output is not None:
        reports = [result.report for result in results]
        write_result(output, reports if config.compare else reports[0])
    if plot is not None:
        runs = {policy: (result.outcome, result.timeline)
                for policy, result in zip(policies, results, strict=True)}  # fmt: skip
        title = f"{config.model} on {config.hardware}, {Path(trace_name(config)).name}, "
        title += f"rate × {config.rate_scale:g}, {config.preemption_mode}"
        plot_runs(plot, runs, title, jobs[0].machine.num_device_blocks)
    return 0


def refuse_pictures_of_several(config: SimulateConfig) -> None:
    """Raise ConfigError where what is drawn of one engine is asked of several."""
    for flag, name in (("--plot", config.plot), ("--trace-events", config.trace_events)):
        if name is not None and config.data_parallel_size > 1:
            raise ConfigError(f"{flag}: of one engine; --data-parallel-size is above 1")


def chosen_policies(config: SimulateConfig) -> list[str]:
    """Return the names to run; raises ConfigError for an unknown or a repeated one."""
    if config.compare is None:
        return [config.scheduling_policy]
    policies = [name.strip() for name in config.compare.split(",")]
    for name in policies:
        if name not in SIMULATED_POLICIES:
            allowed = ", ".join(SIMULATED_POLICIES)
            raise ConfigError(f"--compare: {name!r} is not one of: {allowed}")
        if policies.count(name) > 1:
            raise ConfigError(f"--compare: {name!r} is given twice")
    return policies


def make_jobs(config: SimulateConfig, policies: Sequence[str]) -> list[Job]:
    """Resolve hardware, settings and workload, and return one job per policy."""
    fit = resolve_hardware(config)
    machine = Machine(
        cost_model=fit.cost_model,
        num_device_blocks=fit.num_device_blocks,
        num_host_blocks=fit.num_host_blocks(config.swap_space),
        block_bytes=fit.block_bytes,
        overhead=step_overhead(config, fit),
    )
    scheduler_config = resolve_scheduler_config(config, fit)
    workload = resolve_workload(config, scheduler_config.max_model_len)
    return [
        Job(
            config=dataclasses.replace(scheduler_config, scheduling_policy=policy),
            machine=machine,
            workload=workload,
            num_replicas=config.data_parallel_size,
            is_closed_loop=config.closed_loop,
            settings=describe(config, scheduler_config, fit, machine),
            has_timeline=config.plot is not None,
            journal=_path("--journal", config.journal, policy, policies),
            trace_events=_path("--trace-events", config.trace_events, policy, policies),
        )
        for policy in policies
    ]


def resolve_hardware(config: SimulateConfig) -> HardwareFit:
    """Return the costs and the KV pool of the machine."""
    fit = resolve_cost_model(
        config.model,
        config.hardware,
        dtype="float16" if config.dtype == "auto" else config.dtype,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        block_size=config.block_size,
        memory_utilization=config.gpu_memory_utilization,
        num_device_blocks=config.num_device_blocks,
        swap_bandwidth=config.swap_bandwidth,
        engine=config.engine,
    )
    if config.num_device_blocks is None and config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // fit.shard_bytes
        if num_blocks < 1:
            raise ConfigError(f"--kv-cache-memory-bytes: one block takes {fit.shard_bytes} bytes")
        fit = dataclasses.replace(fit, num_device_blocks=num_blocks)
    return fit


def step_overhead(config: SimulateConfig, fit: HardwareFit) -> StepOverhead:
    """Return the seconds beyond the device: as given, else the engine preset's."""
    if config.step_overhead is None:
        return fit.overhead
    if config.engine is not None:
        raise ConfigError("--step-overhead: --engine has its own")
    try:
        fixed_s, per_seq_s = map(float, config.step_overhead.split(","))
    except ValueError:
        fixed_s = per_seq_s = -1.0
    if not (0.0 <= fixed_s < float("inf") and 0.0 <= per_seq_s < float("inf")):
        raise ConfigError(
            f"--step-overhead {config.step_overhead}: FIXED_S,PER_SEQ_S are two times in seconds"
        )
    return StepOverhead(fixed_s, per_seq_s)


def resolve_scheduler_config(config: SimulateConfig, fit: HardwareFit) -> SchedulerConfig:
    """Return the settings of the scheduler; the window is what the pool can hold, at most."""
    window = pool_window(
        config.max_model_len or fit.max_model_len, fit.num_device_blocks, config.block_size
    )
    return SchedulerConfig.resolve(
        config,
        StepLimits.resolve(config, window, is_cpu=False),
        max_model_len=window,
        num_slots=config.pipeline_parallel_size,
        lookahead=config.lookahead,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        is_strict=True,
    )


def resolve_workload(config: SimulateConfig, window: int) -> Workload:
    """Read the trace, or make requests up, and change them as asked."""
    rng = np.random.default_rng(config.seed)
    if config.trace is None:
        workload = example(rng, config.num_requests or NUM_EXAMPLES)
    else:
        workload = read_trace(Path(config.trace), config.num_requests)
    source = trace_name(config)
    if config.closed_loop and workload.session_id is None:
        raise ConfigError(f"--closed-loop: no session_id in {source}")
    if workload.hash_ids is not None and HASH_ID_TOKENS % config.block_size:
        raise ConfigError(
            f"--block-size: hash_ids of {HASH_ID_TOKENS} tokens do not divide into "
            f"{config.block_size}"
        )
    if config.arrival_cv is not None:
        times = arrivals(rng, len(workload), workload.rate, config.arrival_cv)
        workload = workload.arriving(times)
    if config.arrival_jitter:
        workload = jittered(rng, workload, config.arrival_jitter)
    try:
        workload = workload.faster(config.rate_scale).fitted(window, config.oversize)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if not len(workload):
        raise ConfigError(f"{source}: no row fits the window of {window} tokens")
    return workload


def trace_name(config: SimulateConfig) -> str:
    """Return what messages call the requests."""
    return "made-up requests" if config.trace is None else config.trace


def describe(
    config: SimulateConfig, scheduler_config: SchedulerConfig, fit: HardwareFit, machine: Machine
) -> dict[str, Any]:
    """Return everything the result depends on."""
    asked = {
        name: getattr(config, name)
        for name in sorted(SimulateConfig.flags())
        if name not in NOT_SETTINGS
    }
    scheduler = dataclasses.asdict(scheduler_config)
    resolved = {name: value for name, value in scheduler.items() if name in asked}
    return {
        **asked,
        **resolved,
        "step_overhead": list(machine.overhead[:2]),
        "num_device_blocks": machine.num_device_blocks,
        "num_host_blocks": machine.num_host_blocks,
        "block_bytes": fit.block_bytes,
        "cost_model": dataclasses.asdict(machine.cost_model),
        "cost_source": fit.source,
        **provenance(["fastserve", *sys.argv[1:]]),
    }


def run_all(jobs: Sequence[Job]) -> list[JobResult]:
    """Run the jobs, one per core at a time, under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with make_bar(*columns) as progress:
        tasks = [
            progress.add_task(job.config.scheduling_policy, total=len(job.workload)) for job in jobs
        ]
        if len(jobs) == 1:
            return [run_job(jobs[0], lambda ended: progress.update(tasks[0], completed=ended))]
        return run_side_by_side(
            jobs,
            num_cores(),
            lambda index, ended: progress.update(tasks[index], completed=ended),
        )


def as_table(config: SimulateConfig, results: Sequence[JobResult]) -> Table:
    """Lay the figures out for people: a column per policy."""
    first = results[0].report
    dropped = f" ({first['dropped']:,} dropped)" if first["dropped"] else ""
    several = f"{config.data_parallel_size} × " if config.data_parallel_size > 1 else ""
    title = f"{several}{config.model} on {config.hardware}, "
    title += f"{first['completed']:,} requests{dropped}"
    table = make_table(
        "",
        *(str(result.report["policy"]) for result in results),
        title=f"{title}, rate × {config.rate_scale:g}, {config.preemption_mode}",
    )
    table.columns[0].justify = "left"
    for label, figure, part in ROWS:
        values = [result.report[figure][part] for result in results]
        table.add_row(label, *("-" if value is None else f"{value:.4g}" for value in values))
    for label, figure in COUNTS:
        table.add_row(label, *(f"{result.report[figure]:,}" for result in results))
    walls = [result.report["wall_s"] for result in results]
    table.add_section()
    table.add_row("took, s", *(f"{wall_s:.3g}" for wall_s in walls))
    for label, counts in (
        ("requests simulated / s", [result.report["completed"] for result in results]),
        ("steps simulated / s", [result.outcome.num_steps for result in results]),
    ):
        rates = [count / wall_s for count, wall_s in zip(counts, walls, strict=True)]
        table.add_row(label, *(f"{rate:,.0f}" for rate in rates))
    return table


def _print_sources(config: SimulateConfig, job: Job) -> None:
    """Say on stderr where the requests and the costs come from."""
    if config.trace is None:
        rate, median = EXAMPLE_RATE * config.rate_scale, EXAMPLE_MEDIAN
        say(
            f"no --trace: {len(job.workload):,} made-up requests, {rate:g} a second, "
            f"prompts and answers of {median:g} tokens in the median"
        )
        if config.compare is None:
            say("policies side by side: --compare fcfs,skip-join-mlfq,learned")
    source = job.settings["cost_source"]
    machine = job.machine
    blocks = f"{machine.num_device_blocks:,} KV blocks, {machine.num_host_blocks:,} on the host"
    say(f"costs: {source}; {blocks}")


def _path(
    flag: str, name: str | None, policy: str = "", policies: Sequence[str] = ()
) -> Path | None:
    """Return a file to be written; where several policies write, each has its own."""
    if name is None:
        return None
    if len(policies) > 1:
        name = str(Path(name).with_suffix(f".{policy}{Path(name).suffix}"))
    return output_path(name, flag)
