"""`fastserve profile MODEL`: measures the step times of a model and says how well they fit.

Rules: opens the model as a server does, on all cores but the one of the API process, so that
`serve --profile FILE` accepts the result. Must not know: how steps are timed and fitted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json

from rich.console import Console
from rich.table import Table

from fastserve.checkpoint import locate as checkpoint
from fastserve.core.cost_model import TERMS, CostModel
from fastserve.host.provenance import output_path
from fastserve.host.terminal import make_table, print_table, say
from fastserve.launch.engine import SERVER_CORES
from fastserve.launch.executor import open_executor
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError


def profile_model(config: EngineConfig, output: str | None) -> int:
    """Measure, write the profile, print it."""
    if config.profile is not None:
        raise ConfigError("--profile: this command measures one; --output names the file")
    directory = checkpoint.locate(config.model, config.revision)
    path = None if output is None else output_path(output)
    console = Console(stderr=True)
    with console.status("loading") as status:

        def on_progress(stage: str, fraction: float) -> None:
            status.update(f"{stage} {fraction:.0%}")

        executor = open_executor(
            dataclasses.replace(config, swap_space=0.0),  # no step time depends on it
            directory,
            eos_token_ids=checkpoint.eos_token_ids(directory),
            on_progress=on_progress,
            reserved_cores=SERVER_CORES,
        )
        # Not before: how the threads of torch wait is settled before it is loaded.
        from fastserve.executor import profile_file

        with contextlib.closing(executor):
            fingerprint = profile_file.make_fingerprint(executor.setup)
            if path is None:
                kept = profile_file.cache_path(executor.setup, fingerprint)
                path = output_path(str(kept), "without --output:")
            measurements = executor.measure(on_progress)
    cost_model = profile_file.write_profile(path, fingerprint, measurements)
    print_table(as_table(config.model, cost_model))
    fit_error = json.loads(path.read_text(encoding="utf-8"))["fit_error"]
    say(
        f"{len(measurements)} kinds of step on {fingerprint['device']}, "
        f"threads: {fingerprint['num_threads']}; "
        f"off by {fit_error['mean']:.1%} on average, {fit_error['max']:.1%} at most; "
        f"written to {path}",
        stderr=False,
    )
    return 0


def as_table(model: str, cost_model: CostModel) -> Table:
    """Lay the coefficients out for people."""
    table = make_table("µs", "for", title=f"Step times of {model}")
    table.columns[1].justify = "left"
    for name, meaning in TERMS.items():
        table.add_row(f"{getattr(cost_model, name) * 1e6:,.4g}", meaning)
    table.add_row(f"{cost_model.min_iteration_s * 1e6:,.4g}", "the shortest step there is (q₁)")
    return table
