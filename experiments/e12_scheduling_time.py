"""E12: what deciding a step costs on this machine, beside the time of the step it decides.

Real wall time of `schedule` and `update` of the very scheduler that serves, in a simulated run of
OPT-13B on A100-40G; one process, nothing is cached. The step times are the cost model's.
"""

from __future__ import annotations

import heapq
import time
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.harness import Lab, Setup
from experiments.lengths import named_lengths
from experiments.sweep import saturation
from fastserve.core.build import build_scheduler
from fastserve.core.request import Arrival, SamplingParams
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.sim.clock import VirtualClock
from fastserve.sim.sim_executor import SimExecutor
from fastserve.sim.workload import Workload

NAME = "e12_scheduling_time"
NUM_REQUESTS = 400
LENGTHS = "sharegpt"
LOAD = 1.5
CAPS = (16, 64, 256)
POLICIES = ("fcfs", "mlfq", "skip-join-mlfq")
WARM_UP_STEPS = 50


def timed_run(setup: Setup, policy: str, workload: Workload) -> dict[str, Any]:
    """Run the workload; return seconds of deciding and of the device, step by step."""
    costs = setup.machine().cost_model
    scheduler = build_scheduler(setup.config(policy), costs, setup.machine().num_device_blocks)
    clock = VirtualClock()
    ends: dict[int, int] = {}
    executor = SimExecutor(clock, costs, ends)
    due = [(at, row) for row, at in enumerate(workload.arrived_at.tolist())]
    heapq.heapify(due)
    prompts, params = workload.prompts(), SamplingParams(max_tokens=None)
    decided: list[float] = []
    live: list[int] = []
    busy: list[float] = []
    quiet_garbage_collector()
    while due or scheduler.num_requests:
        while due and due[0][0] <= clock.time:
            at, row = heapq.heappop(due)
            handle = scheduler.add(Arrival(prompts[row], params, clock.time - at), clock.time)
            ends[handle] = len(prompts[row]) + int(workload.output_tokens[row])
        begun = time.perf_counter()
        plan = scheduler.schedule(clock.time, True)
        spent = time.perf_counter() - begun
        if plan is None or not plan.work:
            clock.time = due[0][0]
            continue
        executor.submit(plan)
        output = executor.wait(float("inf"))
        assert output is not None
        live.append(scheduler.num_requests)
        begun = time.perf_counter()
        scheduler.update(output, clock.time)
        decided.append(spent + time.perf_counter() - begun)
        busy.append(output.steps[0].device_s)
    return {"decided_s": decided[WARM_UP_STEPS:], "busy_s": busy[WARM_UP_STEPS:], "live": live}


def summed_up(run: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a run."""
    decided, busy = np.array(run["decided_s"]) * 1e3, np.array(run["busy_s"]) * 1e3
    return {
        "steps": float(len(decided)),
        "median_ms": float(np.median(decided)),
        "p99_ms": float(np.percentile(decided, 99)),
        "step_median_ms": float(np.median(busy)),
        "share_of_step": float(decided.sum() / busy.sum()),
        "most_requests": float(max(run["live"])),
    }


def run(lab: Lab) -> None:
    """Time each policy at each cap, in overload, so that many requests are ordered."""
    source = named_lengths(LENGTHS, lab.traces)
    figures: dict[str, Any] = {}
    picture = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, cap in zip(picture.subplots(1, len(CAPS)), CAPS, strict=True):
        setup = Setup("opt-13b", "a100-40g", max_num_seqs=cap)
        rate = LOAD * saturation(setup, source)
        for policy in POLICIES:
            runs = [
                timed_run(setup, policy, source.arriving(
                    rate, seed=seed, num_requests=lab.sized(NUM_REQUESTS)))
                for seed in lab.seeds()
            ]  # fmt: skip
            figures[f"cap {cap}, {policy}"] = [summed_up(one) for one in runs]
            decided = np.sort(np.concatenate([one["decided_s"] for one in runs])) * 1e3
            axes.plot(decided, np.linspace(0, 1, len(decided)), label=policy)
        axes.set_xscale("log")
        axes.set_title(f"cap {cap}", fontsize=9)
        axes.set_xlabel("schedule + update, ms", fontsize=8)
        axes.set_ylabel("share of steps", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    lab.save(
        NAME,
        settings={"setup": Setup("opt-13b", "a100-40g").describe(), "caps": CAPS, "load": LOAD,
                  "arrivals": "Poisson, redrawn per seed", "seeds": list(lab.seeds()),
                  "lengths": source.origin, "requests": lab.sized(NUM_REQUESTS)},
        figures=figures,
        picture=picture,
    )  # fmt: skip
