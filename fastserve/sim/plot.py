"""Draws runs of one workload: the distribution of JCT, queue lengths and live KV over time.

Must not know: how the runs were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastserve.sim.simulator import Outcome
from fastserve.sim.timeline import TimelineSample

Runs = Mapping[str, tuple[Outcome, Sequence[TimelineSample]]]


def plot_runs(path: Path, runs: Runs, title: str, num_device_blocks: int) -> None:
    """Write a PNG with one line per policy in each panel."""
    figure = Figure(figsize=(8, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    distribution, queue, memory = figure.subplots(3, 1)
    for policy, (outcome, timeline) in runs.items():
        jct_s = np.sort(outcome.finished_at - outcome.arrived_at)
        shares = np.arange(1, len(jct_s) + 1) / len(jct_s)
        distribution.plot(jct_s, shares, label=policy)
        times = [sample.at for sample in timeline]
        queued = [sample.num_waiting + sample.num_preempted for sample in timeline]
        queue.plot(times, queued, label=policy, linewidth=1)
        [line] = memory.plot(times, [sample.num_device_blocks for sample in timeline],
                             label=policy, linewidth=1)  # fmt: skip
        if any(sample.num_host_blocks for sample in timeline):
            memory.plot(times, [sample.num_host_blocks for sample in timeline], linestyle=":",
                        label=f"{policy}, on the host", color=line.get_color(),
                        linewidth=1)  # fmt: skip
    memory.axhline(num_device_blocks, color="grey", linestyle="--", label="room on the device")
    _finish(distribution, "JCT (s)", "share of requests")
    distribution.set_xscale("log")
    distribution.set_ylim(0, 1)
    _finish(queue, "time (s)", "requests not in the step")
    _finish(memory, "time (s)", "KV blocks held")
    figure.savefig(path, dpi=120, format="png")


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
