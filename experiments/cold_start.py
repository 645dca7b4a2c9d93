"""What a policy that learns loses before it has learned: `python -m experiments.cold_start`.

Traces are cut into runs of so many requests, at a share of what FCFS can serve of them. Every run
is made by `learned` from nothing; from nothing with a model that counts those still running, too,
as longer than they are now (Kaplan and Meier's estimate); and with what other rows of the trace
taught it, as a server has that was restarted. Must not know: how the policy orders.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.lengths import traces_folder
from experiments.workload_traces import WINDOW
from experiments.workloads import SETUP
from fastserve.core.build import policy_factory
from fastserve.core.lengths import (
    BEGINNING,
    EDGES,
    NUM_BINS,
    Histogram,
    Labels,
    LengthModel,
    bin_of,
    labels_of,
)
from fastserve.core.policies.learned import Learned
from fastserve.core.policies.protocol import ClassPolicy
from fastserve.core.request import Arrival, Handle, Request, SamplingParams
from fastserve.host.terminal import say
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.simulator import simulate
from fastserve.sim.trace_file import read_trace
from fastserve.sim.workload import Workload

TRACES = ("azure23_conv", "bwb_longdecode", "mix_alpaca90_bwb10", "sharegpt")
LOADS = (0.9, 1.1)
NUM_READ = 3000  # rows of a trace; what is not run is taught


class SurvivorModel(LengthModel):
    """A LengthModel to which a request that runs says that its answer is longer than it is now."""

    policies: Sequence[Learned] = ()

    def distribution(self, labels: Labels) -> list[float]:
        """Return the probability of each bin, by the hazard in each."""
        mean = self.mean_tokens
        longer = [math.exp((1 - edge) / mean) for edge in EDGES]
        shares = [here - after for here, after in zip(longer, [*longer[1:], 0.0], strict=True)]
        running = self.running()
        shares = self._estimated(self._all, [index for index, _ in running], shares)
        for label in labels:
            histogram = self._kinds.get(label[0], {}).get(label, Histogram())
            ages = [index for index, own in running if label in own]
            shares = self._estimated(histogram, ages, shares)
        return shares

    def running(self) -> list[tuple[int, Labels]]:
        """Return the bin that each answer is in that has begun, and its labels."""
        return [
            (bin_of(account.request.num_output_tokens + 1), account.labels)
            for policy in self.policies
            for account in policy._accounts.values()
            if account.request.num_output_tokens
        ]

    def _estimated(
        self, histogram: Histogram, ages: Sequence[int], prior: Sequence[float]
    ) -> list[float]:
        """Return the shares by hazards (h + k · p) / (those that got so far)."""
        leaving = [self._shrinkage * share for share in prior]
        for index, weight in histogram.weights.items():
            leaving[index] += weight / self._weight
        survived = [0] * (NUM_BINS + 1)  # those running now that are beyond the bin
        for index in ages:
            survived[index] += 1
        at_risk, beyond, shares = 0.0, 0, [0.0] * NUM_BINS
        hazards = [0.0] * NUM_BINS
        for k in range(NUM_BINS - 1, -1, -1):
            beyond += survived[k + 1]
            at_risk += leaving[k]
            hazards[k] = leaving[k] / (at_risk + beyond) if at_risk + beyond else 1.0
        left = 1.0
        for k, hazard in enumerate(hazards):
            shares[k] = left * (hazard if k < NUM_BINS - 1 else 1.0)
            left -= shares[k]
        return shares


def mean_jct_s(config: SchedulerConfig, workload: Workload, model: LengthModel | None) -> float:
    """Return the mean completion time under the configured policy, which begins with a model."""
    machine = SETUP.machine()
    make_policy = policy_factory(
        config, machine.cost_model, machine.num_device_blocks, length_model=model
    )
    policy: ClassPolicy = make_policy()
    if isinstance(model, SurvivorModel):
        assert isinstance(policy, Learned)
        model.policies = (policy,)
    outcome = simulate(config, machine, workload, policy=policy)
    return float((outcome.finished_at - outcome.arrived_at).mean())


def taught(workload: Workload, config: SchedulerConfig) -> LengthModel:
    """Return a model that has seen the answers of all rows."""
    model, prompts = LengthModel(), workload.prompts()
    clients = workload.client or ("",) * len(workload)
    for row, num_tokens in enumerate(workload.output_tokens.tolist()):
        arrival = Arrival(prompts[row], SamplingParams(max_tokens=None), client=clients[row])
        request = Request(
            Handle(row), arrival, max_output_tokens=config.max_model_len - len(prompts[row])
        )
        labels = labels_of(request, config.max_model_len, config.block_size)
        # Ids that a trace lacks are made up anew for the rows that run: no prompt begins as these.
        model.add(tuple(label for label in labels if label[0] != BEGINNING), num_tokens)
    return model


def compare(
    trace: Workload, load: float, num_runs: int, num_rows: int
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the mean JCT of each run by variant, at a share of what FCFS can serve."""
    fcfs, learned = (SETUP.config(name, "ideal") for name in ("fcfs", "learned"))
    found: dict[str, list[float]] = {"fcfs": [], "cold": [], "survivors": [], "warm": []}
    for start in range(0, num_runs * num_rows, num_rows):
        index = np.arange(start, start + num_rows)
        rows = trace.rows(index)
        rows = rows.arriving(rows.arrived_at - rows.arrived_at[0])
        outcome = simulate(fcfs, SETUP.machine(), rows.arriving(np.zeros(len(rows))))
        capacity = len(rows) / float(np.sort(outcome.finished_at)[-SETUP.max_num_seqs])
        timed = rows.faster(load * capacity / rows.rate)
        others = trace.rows(np.setdiff1d(np.arange(len(trace)), index))
        found["fcfs"].append(mean_jct_s(fcfs, timed, None))
        found["cold"].append(mean_jct_s(learned, timed, LengthModel()))
        found["survivors"].append(mean_jct_s(learned, timed, SurvivorModel()))
        found["warm"].append(mean_jct_s(learned, timed, taught(others, learned)))
    return {name: np.array(jct_s) for name, jct_s in found.items()}


def row_of(jct_s: Mapping[str, npt.NDArray[np.float64]]) -> str:
    """Return mean JCT over that of `learned` from nothing: the geometric mean, least and most."""
    cells = []
    for name in ("fcfs", "survivors", "warm"):
        ratio = jct_s[name] / jct_s["cold"]
        span = f" ({ratio.min():.2f} to {ratio.max():.2f})" if len(ratio) > 1 else ""
        cells.append(f"{np.exp(np.log(ratio).mean()):.3f}{span}")
    return " | ".join(cells)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, help="folder of traces")
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--rows", type=int, default=150, help="requests of a run")
    args = parser.parse_args()
    folder = traces_folder(args.traces)
    if folder is None:
        parser.error("there is no folder of traces")
    say("| trace | load | fcfs | survivors | warm |\n|---|---|---|---|---|", stderr=False)
    for name in TRACES:
        trace = read_trace(folder / f"{name}_dev.csv.gz", NUM_READ).fitted(WINDOW, "drop")
        for load in LOADS:
            jct_s = compare(trace, load, args.runs, args.rows)
            say(f"| {name} | {load} | {row_of(jct_s)} |", stderr=False)


if __name__ == "__main__":
    main()
