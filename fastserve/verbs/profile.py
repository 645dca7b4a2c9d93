"""`fastserve profile MODEL`: measures the step times of a model and says how well they fit.

Rules: measures as a server would run, on all cores but the one of the API process, so that
`serve --profile FILE` accepts the result. Must not know: how steps are timed and fitted.
"""

from __future__ import annotations

import dataclasses
import json

import torch
from rich.console import Console
from rich.table import Table

from fastserve.checkpoint import locate as checkpoint
from fastserve.core.cost_model import CostModel
from fastserve.executor import profiler
from fastserve.executor.worker import Worker
from fastserve.host.machine import num_cores
from fastserve.host.provenance import output_path
from fastserve.host.terminal import make_table, say
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError

MEANING = {
    "base_s": "a step, whatever is in it",
    "prefill_token_s": "a prompt token",
    "prefill_pair_s": "a prompt token, for each token it attends to",
    "decode_seq_s": "a sequence that decodes",
    "decode_context_s": "a decode, for each token it attends to",
}


def profile_model(config: EngineConfig, output: str | None) -> int:
    """Measure, write the profile, print it."""
    if config.profile is not None:
        raise ConfigError("--profile: this command measures one; --output names the file")
    directory = checkpoint.locate(config.model, config.revision)
    path = None if output is None else output_path(output)
    num_threads = config.num_threads or max(1, num_cores() - 1)
    torch.set_num_threads(num_threads)
    console = Console(stderr=True)
    with console.status("loading") as status:

        def on_progress(stage: str, fraction: float) -> None:
            status.update(f"{stage} {fraction:.0%}")

        worker = Worker(
            config,
            directory,
            eos_token_ids=checkpoint.eos_token_ids(directory),
            on_progress=on_progress,
        )
        fingerprint = profiler.make_fingerprint(worker, num_threads)
        if path is None:
            kept = profiler.cache_path(worker, fingerprint)
            path = output_path(str(kept), "without --output:")
        measurements = profiler.measure(worker, on_progress)
    cost_model = profiler.write_profile(path, fingerprint, measurements)
    Console().print(as_table(config.model, cost_model))
    fit_error = json.loads(path.read_text(encoding="utf-8"))["fit_error"]
    say(
        f"{len(measurements)} kinds of step on {fingerprint['device']}, threads: {num_threads}; "
        f"off by {fit_error['mean']:.1%} on average, {fit_error['max']:.1%} at most; "
        f"written to {path}",
        stderr=False,
    )
    return 0


def as_table(model: str, cost_model: CostModel) -> Table:
    """Lay the coefficients out for people."""
    table = make_table("µs", "for", title=f"Step times of {model}")
    table.columns[1].justify = "left"
    for name, value in dataclasses.asdict(cost_model).items():
        if name in MEANING:
            table.add_row(f"{value * 1e6:,.4g}", MEANING[name])
    table.add_row(f"{cost_model.min_iteration_s * 1e6:,.4g}", "the shortest step there is (q₁)")
    return table
