"""Prompt and answer lengths by name: from the traces where they are, else generated.

Rules: Poisson or Gamma arrivals are redrawn for each seed at one a second, then scaled, so that
the same seed gives the same requests in the same rhythm at every rate. The generated stand-ins are
lognormal with the median and P90 of the traces' own table. Must not know: what is measured.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastserve.host.provenance import ROOT
from fastserve.sim.generators import Lengths as Distribution
from fastserve.sim.generators import Lognormal, generate, resample
from fastserve.sim.trace_file import read_trace
from fastserve.sim.workload import Workload

TRACES = ROOT.parent / "shared" / "traces"

GENERATED = {
    "sharegpt": (Lognormal(31, 1.87, 4, 1024), Lognormal(287, 0.66, 4, 1024)),
    "alpaca": (Lognormal(17, 0.54, 4, 188), Lognormal(49, 0.84, 1, 751)),
}
NUM_DRAWN = 8000
"""So many are drawn however few are wanted, so that a short run is the beginning of a long one."""

FILES = {"sharegpt": "sharegpt_dev.csv.gz", "alpaca": "alpaca_dev.csv.gz"}


@dataclass(frozen=True, slots=True)
class LengthSource:
    """Where lengths come from; `origin` says it in a result."""

    name: str
    origin: str
    observed: Workload | None = None
    prompt: Distribution | None = None
    output: Distribution | None = None

    def arriving(
        self, rate: float, *, seed: int, num_requests: int, cv: float = 1.0, window: int = 2048
    ) -> Workload:
        """Return so many requests; what exceeds the window is cut there."""
        rng = np.random.default_rng(seed)
        count = max(num_requests, NUM_DRAWN)
        if self.observed is not None:
            workload = resample(rng, self.observed, count, 1.0, cv)
        else:
            assert self.prompt is not None
            assert self.output is not None
            workload = generate(rng, count, 1.0, self.prompt, self.output, cv=cv)
        return workload.first(num_requests).fitted(window, "clip").faster(rate)


def traces_folder(given: str | Path | None = None) -> Path | None:
    """Return the folder of traces: given, or FASTSERVE_TRACES, or beside the checkout, or none."""
    named = given or os.environ.get("FASTSERVE_TRACES")
    if named:
        return Path(named)
    return TRACES if TRACES.is_dir() else None


@functools.cache
def named_lengths(name: str, traces: Path | None) -> LengthSource:
    """Return ShareGPT-like or Alpaca-like lengths."""
    if traces is not None:
        file = traces / FILES[name]
        return LengthSource(name, f"lengths of {file.name}, resampled", read_trace(file))
    return drawn(name, *GENERATED[name])


def drawn(name: str, prompt: Distribution, output: Distribution) -> LengthSource:
    """Return lengths drawn from distributions, prompt and answer independent."""
    origin = f"generated: prompt {prompt}, output {output}"
    return LengthSource(name, origin, prompt=prompt, output=output)
