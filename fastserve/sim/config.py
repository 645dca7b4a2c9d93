"""What `fastserve simulate` takes: the engine's settings, the machine, the workload, the outputs.

Must not know: how anything is simulated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastserve.settings.engine import POLICIES, PREEMPTION_MODES, EngineConfig
from fastserve.settings.option import option
from fastserve.settings.scheduler import SchedulerConfig

_DEFAULTS = {spec.name: spec.default for spec in dataclasses.fields(EngineConfig)}
SIMULATED_POLICIES = (*POLICIES, "srpt")  # srpt must be told the output lengths
SIMULATED_PREEMPTION_MODES = (*PREEMPTION_MODES, "ideal")  # ideal needs a link that does not exist


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateConfig(EngineConfig):
    """The simulated machine, its workload, and what is written about it.

    What the engine cannot do yet, but virtual time can, is declared anew.
    """

    model: str = option(
        "opt-13b", "name of a model, or directory with a config.json", positional=True
    )
    hardware: str = option(
        "a100-40g",
        "name of a device (a100-40g, a100-80g, h100, h200), or FILE of `fastserve profile`",
    )
    engine: str | None = option(None, "overheads of another engine (vllm-2023)")
    step_overhead: str | None = option(
        None, "FIXED_S,PER_SEQ_S: seconds each step costs beyond the device (0,0)"
    )
    data_parallel_size: int = option(
        1,
        "engines with a copy of the model each, behind one router",
        minimum=1,
        maximum=1024,
        aliases=("-dp",),
    )
    lookahead: int = option(0, "steps submitted behind an unfinished one", choices=(0, 1))

    trace: str | None = option(
        None,
        "FILE.csv, .csv.gz, .jsonl or .jsonl.gz with arrived_at, prompt_tokens, output_tokens "
        "(made-up requests)",
    )
    num_requests: int | None = option(
        None, "first rows of the trace to run (all; 500 made-up ones)", minimum=1
    )
    rate_scale: float = option(1.0, "times as many arrivals a second", minimum=1e-6)
    arrival_cv: float | None = option(
        None, "redraw the gaps, Gamma with this coefficient of variation (1: Poisson)", minimum=0.0
    )
    arrival_jitter: float = option(
        0.0, "seconds of uniform noise on each arrival, for traces with coarse clocks", minimum=0.0
    )
    closed_loop: bool = option(
        False, "a session's next turn comes think_s after the answer, not when the trace says"
    )
    oversize: str = option("error", "rows beyond the window", choices=("error", "drop", "clip"))
    seed: int = option(0, "of redrawn arrivals and made-up requests", minimum=0)

    scheduling_policy: str = option(
        "learned", "order in which requests run", choices=SIMULATED_POLICIES
    )
    compare: str | None = option(None, "several policies over the same trace: P,Q,R")
    preemption_mode: str = option(
        _DEFAULTS["preemption_mode"],
        "what becomes of the KV of a request that loses its place",
        choices=SIMULATED_PREEMPTION_MODES,
    )
    swap_space: float = option(
        _DEFAULTS["swap_space"],
        "GiB of host memory per device for KV that has no place on it; 0: none",
        minimum=0.0,
        maximum=2.0**20,
    )
    swap_bandwidth: float | None = option(
        None,
        "GB/s to copy KV at in each direction, per device (0.8 of the hardware's PCIe; a profile: "
        "10)",
        minimum=1e-6,
    )

    output: str | None = option(None, "file to write the figures to, as JSON")
    plot: str | None = option(None, "PNG to draw JCT, queues and KV over time in")
    trace_events: str | None = option(None, "file for Perfetto: every step, as JSON")

    @classmethod
    def flags(cls) -> frozenset[str]:
        """Return the fields that simulate: its own, and those that shape a schedule or a pool."""
        own = set(cls.__annotations__)
        shaping = {spec.name for spec in dataclasses.fields(SchedulerConfig)}
        machine = {
            "model", "dtype", "num_device_blocks", "gpu_memory_utilization",
            "kv_cache_memory_bytes", "journal", "tensor_parallel_size", "pipeline_parallel_size",
        }  # fmt: skip
        inherited = {spec.name for spec in dataclasses.fields(EngineConfig)}
        return frozenset(own | ((shaping | machine) & inherited))
