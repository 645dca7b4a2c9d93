"""Which labels tell how long an answer will be: `python -m experiments.labels`.

Each label of `core/lengths.py` beside the same without it: how well predictions rank the answers of
a trace that are told one by one (Kendall's τ), and mean JCT of `learned`. Writes
results/labels.json and a table of docs/workloads.md. Must not know: what a label is made from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.harness import Lab
from experiments.lengths import traces_folder
from experiments.markdown import fill, markdown, number, share
from experiments.workload_traces import ROWS, at_load, load_traces, prepared, trace_file
from experiments.workloads import SETUP, capacities, point
from fastserve.core.build import policy_factory
from fastserve.core.gittins import AnswerLength
from fastserve.core.lengths import Labels, LengthModel, labels_of
from fastserve.core.request import Arrival, Handle, Request, SamplingParams
from fastserve.host.provenance import ROOT, commit
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.simulator import simulate
from fastserve.sim.trace_file import read_trace
from fastserve.sim.workload import Workload

LOAD = 1.0
PROMPT, CLIENT, BEGINNING = "p", "c", "b"
NAMES = {PROMPT: "prompt length", CLIENT: "client", BEGINNING: "first block of the prompt"}
WITH_CLIENTS = ("lmsys_arena27",)
WITH_BEGINNINGS = ("mooncake_conv", "mooncake_synth")
DRIFT = ("sharegpt", "azure23_conv")

Measured = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A timed workload, and the label to be left out beside those that stay in."""

    trace: str
    workload: Workload
    kept: str
    label: str


class NarrowModel(LengthModel):
    """A LengthModel that is blind to all but some kinds of labels."""

    def __init__(self, kinds: str) -> None:
        """Take the first characters of the labels that it sees."""
        super().__init__()
        self._seen = kinds

    def narrowed(self, labels: Labels) -> Labels:
        """Return the labels that it sees."""
        return tuple([label for label in labels if label[0] in self._seen])

    def telling(self, labels: Labels) -> Labels:
        """Return what is asked about of a request with these labels."""
        return super().telling(self.narrowed(labels))

    def add(self, labels: Labels, num_tokens: int) -> None:
        """Take in an answer."""
        super().add(self.narrowed(labels), num_tokens)


def labels_by_row(workload: Workload, config: SchedulerConfig) -> Iterator[Labels]:
    """Yield what is known of each request when it arrives."""
    prompts = workload.prompts()
    clients = workload.client or ("",) * len(workload)
    for row, client in enumerate(clients):
        prompt = prompts[row]
        hashes = prompts.block_hashes(row, config.block_size) or ()
        arrival = Arrival(prompt, SamplingParams(max_tokens=None), block_hashes=hashes,
                          client=client)  # fmt: skip
        request = Request(
            Handle(row), arrival, max_output_tokens=config.max_model_len - len(prompt)
        )
        yield labels_of(request, config.max_model_len, config.block_size)


def predictions(
    model: LengthModel, labels: Sequence[Labels], num_tokens: Sequence[int]
) -> list[float]:
    """Return the mean that each answer was expected to have, all those before it being known."""
    means = []
    for own, answered in zip(labels, num_tokens, strict=True):
        means.append(AnswerLength(model.distribution(model.telling(own))).tokens_left(0))
        model.add(own, answered)
    return means


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's τ-b, pair by pair; NaN where all of one side are equal."""
    signs = [np.sign(np.subtract.outer(side, side)) for side in map(np.asarray, (first, second))]
    untied = [float(np.abs(sign).sum()) for sign in signs]
    if not all(untied):
        return float("nan")
    return float((signs[0] * signs[1]).sum() / np.sqrt(untied[0] * untied[1]))


def joined(first: Workload, second: Workload) -> Workload:
    """Return the requests of one trace, then those of another: lengths and arrivals."""
    start = first.arrived_at[-1] + 1.0 / second.rate - second.arrived_at[0]
    return Workload(
        arrived_at=np.concatenate([first.arrived_at, start + second.arrived_at]),
        prompt_tokens=np.concatenate([first.prompt_tokens, second.prompt_tokens]),
        output_tokens=np.concatenate([first.output_tokens, second.output_tokens]),
    )


def make_cases(lab: Lab) -> list[Case]:
    """Return every label on the traces that have it."""
    traces = load_traces(lab)
    capacity = capacities(lab, traces)
    timed = {name: at_load(trace, LOAD, capacity[name]) for name, trace in traces.items()}
    cases = [Case(name, workload, "", PROMPT) for name, workload in timed.items()]
    cases += [Case(name, timed[name], PROMPT, CLIENT) for name in WITH_CLIENTS if name in timed]
    for name in (name for name in WITH_BEGINNINGS if name in timed):
        file = trace_file(lab, name)
        assert file is not None
        trace = read_trace(file, lab.sized(ROWS[name], 60))
        whole = at_load(prepared(name, trace, keeps_prefixes=True), LOAD, capacity[name])
        cases.append(Case(name, whole, PROMPT, BEGINNING))
    if all(name in timed for name in DRIFT):
        both = joined(*(timed[name] for name in DRIFT))
        cases.append(Case(", then ".join(DRIFT), both, "", PROMPT))
    return cases


def learned_jct_s(workload: Workload, model: LengthModel) -> float:
    """Return mean JCT of `learned` with a model that knows nothing yet."""
    config, machine = SETUP.config("learned", "ideal"), SETUP.machine()
    make_policy = policy_factory(
        config, machine.cost_model, machine.num_device_blocks, length_model=model
    )
    outcome = simulate(config, machine, workload, policy=make_policy())
    return float((outcome.finished_at - outcome.arrived_at).mean())


def measure(case: Case, fcfs_jct_s: float) -> Measured:
    """Return how well answers are ranked, and mean JCT, with and without the label."""
    config = SETUP.config("learned")
    labels = list(labels_by_row(case.workload, config))
    answered: npt.NDArray[np.int64] = case.workload.output_tokens
    found: dict[str, Any] = {"trace": case.trace, "label": NAMES[case.label],
                             "rows": len(case.workload), "fcfs_jct_s": fcfs_jct_s}  # fmt: skip
    for name, kinds in (("without", case.kept), ("with", case.kept + case.label)):
        means = predictions(NarrowModel(kinds), labels, answered.tolist())
        found[f"tau_{name}"] = kendall_tau(means, answered.tolist())
        jct_s = learned_jct_s(case.workload, NarrowModel(kinds))
        found[f"jct_{name}_over_fcfs"] = jct_s / fcfs_jct_s
    return found


def run(lab: Lab, document: Path) -> None:
    """Measure, save and write the table."""
    cases = make_cases(lab)
    if not cases:
        return
    points = [point({"trace": case.trace}, case.workload, "fcfs") for case in cases]
    fcfs = lab.run("labels, fcfs", points)
    entries = [measure(case, result.report["jct_s"]["mean"])
               for case, result in zip(cases, fcfs, strict=True)]  # fmt: skip
    settings = {"machine": SETUP.describe(), "load": LOAD, "told": "each answer before the next"}
    lab.save("labels", settings=settings, figures={"commit": commit(), "entries": entries})
    if not lab.is_quick:
        fill(document, {"labels": table_of(entries)})


def table_of(entries: Sequence[Measured]) -> str:
    """Return a row per label and trace: without → with."""
    rows = []
    for entry in entries:
        tau = " → ".join(tau_of(entry[f"tau_{name}"]) for name in ("without", "with"))
        jct = " → ".join(share(entry[f"jct_{name}_over_fcfs"]) for name in ("without", "with"))
        rows.append([entry["label"], entry["trace"], number(entry["rows"]), tau, jct])
    return markdown(["label", "trace", "rows", "τ", "mean JCT over that of FCFS"], rows)


def tau_of(value: float) -> str:
    """Return τ for people; a dash where nothing was ranked."""
    return "-" if np.isnan(value) else f"{value:.2f}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: does it work?")
    parser.add_argument("--traces", help="folder of the traces")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "workloads.md")
    arguments = parser.parse_args()
    lab = Lab(is_quick=arguments.quick, traces=traces_folder(arguments.traces),
              output=arguments.output, command=["python", "-m", "experiments.labels"])  # fmt: skip
    run(lab, arguments.document)


if __name__ == "__main__":
    main()
