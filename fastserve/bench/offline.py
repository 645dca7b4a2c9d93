"""`fastserve bench offline`: tokens a second of the engine in this process, without HTTP.

Rules: the real engine, scheduler and executor; prompts are random ids that share no prefix; answers
are greedy and of exact length. The batch sizes take turns: one round to warm up, then three, and
every figure is the median of the three, as are the floors measured between them.
`tokens_per_s` of a decode row leaves out prefill: the tokens that came after the last request's
first one, over the time from then to the end. `total_tokens_per_s` counts all tokens over all the
time, prefill included. Prefill is one prompt, its length over its time to first token.
Must not know: text, how a step is computed.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastserve.bench.config import OfflineBenchConfig
from fastserve.core.request import Arrival, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.host.provenance import output_path, provenance, write_result
from fastserve.host.terminal import make_bar, make_table, print_table
from fastserve.launch.engine import open_engine, require_one_engine
from fastserve.launch.executor import count_threads
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.wire.engine_messages import EngineInfo

if TYPE_CHECKING:
    from fastserve.bench.floors import Floors

ROUNDS = 3
LEAST_TOKENS_A_STEP = 2048
LEAST_SEQS = 64


class Decode(NamedTuple):
    """One batch, run once."""

    tokens_per_s: float
    total_tokens_per_s: float
    step_ms_p50: float


class Round(NamedTuple):
    """Every measurement once."""

    decodes: list[Decode]
    prefill_tokens_per_s: float
    copy_gb_per_s: float
    product_gflop_per_s: float


class Offline:
    """Runs batches on an engine, each with prompts of its own."""

    def __init__(self, engine: Engine, info: EngineInfo, seed: int) -> None:
        self.engine = engine
        self.info = info
        self._random = random.Random(seed)

    def decode(self, batch_size: int, input_len: int, output_len: int) -> Decode:
        """Run `batch_size` requests that arrive together."""
        started = self.engine.clock.now()
        handles = {self._add(input_len, output_len) for _ in range(batch_size)}
        ends, tokens = [], []  # of each step: when, and how many
        first_step = 0  # the step that brought the last first token
        while self.engine.num_requests:
            updates = self.engine.step()
            ends.append(self.engine.clock.now())
            tokens.append(sum(len(update.samples) for update in updates))
            if handles:
                handles.difference_update(update.handle for update in updates if update.samples)
                first_step = len(ends) - 1
        self._drain()
        gaps = [later - sooner for sooner, later in itertools.pairwise(ends[first_step:])]
        return Decode(
            tokens_per_s=sum(tokens[first_step + 1 :]) / (ends[-1] - ends[first_step]),
            total_tokens_per_s=sum(tokens) / (ends[-1] - started),
            step_ms_p50=statistics.median(gaps) * 1e3,
        )

    def prefill(self, length: int) -> float:
        """Return the prompt tokens a second of one prompt."""
        started = self.engine.clock.now()
        self._add(length, 1)
        while self.engine.num_requests:
            self.engine.step()
        seconds = self.engine.clock.now() - started
        self._drain()
        return length / seconds

    def _add(self, input_len: int, output_len: int) -> int:
        ids = [self._random.randrange(self.info.vocab_size) for _ in range(input_len)]
        params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, seed=0)
        return self.engine.add(Arrival(ids, params))

    def _drain(self) -> None:
        """Wait for steps that ran ahead of the end."""
        while not self.engine.is_idle:
            self.engine.step()


def measure_offline(bench: OfflineBenchConfig, config: EngineConfig) -> int:
    """Measure every row, print them and write them to the file asked for."""
    require_one_engine(config, "bench offline")
    path = None if bench.output is None else output_path(bench.output)
    config = with_room(bench, config)
    console = Console(stderr=True)
    with console.status("loading") as status:
        engine, info = open_engine(
            config, lambda stage, fraction: status.update(f"{stage} {fraction:.0%}")
        )
    # Not before: how the threads of torch wait is settled by open_engine before it loads torch.
    from fastserve.bench.floors import Floors

    try:
        check_fits(bench, info)
        quiet_garbage_collector()  # as the engine process does
        offline = Offline(engine, info, config.seed)
        floors = Floors(info.dtype, info.device, count_threads(config))
        with make_bar(*Progress.get_default_columns()) as progress:
            parts = len(bench.batch_sizes()) + 1
            task = progress.add_task("measuring", total=(1 + ROUNDS) * parts)
            rounds = [
                measure_round(offline, floors, bench, lambda: progress.advance(task))
                for _ in range(1 + ROUNDS)
            ]
    finally:
        engine.close()
    result = figures(bench, config, info, rounds[1:])  # the first was to warm up
    print_table(as_table(result))
    if path is not None:
        write_result(path, result)
    return 0


def with_room(bench: OfflineBenchConfig, config: EngineConfig) -> EngineConfig:
    """Let one step hold any batch, and one step any prefill, unless flags say otherwise.

    Raises ConfigError where they leave no room for a whole batch.
    """
    largest = max(bench.batch_sizes())
    seqs = config.max_num_seqs or max(LEAST_SEQS, largest)
    if seqs < largest:
        raise ConfigError(f"--max-num-seqs: {seqs} is below the batch size of {largest}")
    asked = max(bench.prefill_len, largest * bench.input_len)
    tokens = config.max_num_batched_tokens or max(LEAST_TOKENS_A_STEP, asked, seqs)
    return dataclasses.replace(config, max_num_seqs=seqs, max_num_batched_tokens=tokens)


def check_fits(bench: OfflineBenchConfig, info: EngineInfo) -> None:
    """Raise ConfigError for lengths beyond the window, and for a batch that KV cannot hold."""
    decoding = bench.input_len + bench.output_len
    for flags, length in (
        ("--input-len and --output-len", decoding),
        ("--prefill-len and its one token", bench.prefill_len + 1),
    ):
        if length > info.max_request_tokens:
            raise ConfigError(f"{flags}: {length} tokens exceed {info.max_request_tokens}")
    needed = max(bench.batch_sizes()) * -(-decoding // info.block_size)
    if needed > info.num_device_blocks:
        raise ConfigError(
            f"--batch-size: {max(bench.batch_sizes())} requests of {decoding} tokens need "
            f"{needed} KV blocks, and there are {info.num_device_blocks}"
        )


def measure_round(
    offline: Offline, floors: Floors, bench: OfflineBenchConfig, on_done: Callable[[], None]
) -> Round:
    """Measure everything once."""
    decodes = []
    for batch_size in bench.batch_sizes():
        decodes.append(offline.decode(batch_size, bench.input_len, bench.output_len))
        on_done()
    prefill = offline.prefill(bench.prefill_len)
    result = Round(decodes, prefill, floors.copy_gb_per_s(), floors.product_gflop_per_s())
    on_done()
    return result


def figures(
    bench: OfflineBenchConfig, config: EngineConfig, info: EngineInfo, rounds: Sequence[Round]
) -> dict[str, Any]:
    """Return the medians, with what they were measured on."""

    def median(values: Iterable[float]) -> float:
        return round(statistics.median(values), 3)

    rows = []
    for index, batch_size in enumerate(bench.batch_sizes()):
        decodes = [each.decodes[index] for each in rounds]
        rows.append(
            {
                "batch_size": batch_size,
                "input_len": bench.input_len,
                "output_len": bench.output_len,
                "tokens_per_s": median(each.tokens_per_s for each in decodes),
                "step_ms_p50": median(each.step_ms_p50 for each in decodes),
                "total_tokens_per_s": median(each.total_tokens_per_s for each in decodes),
            }
        )
    return {
        "model": info.model,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "device": info.device,
        "threads": count_threads(config),
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "decode": rows,
        "prefill": {
            "len": bench.prefill_len,
            "tokens_per_s": median(each.prefill_tokens_per_s for each in rounds),
        },
        "copy_gb_per_s": median(each.copy_gb_per_s for each in rounds),
        "product_gflop_per_s": median(each.product_gflop_per_s for each in rounds),
        **provenance(["fastserve", *sys.argv[1:]]),
    }


def as_table(result: Mapping[str, Any]) -> Table:
    """Lay the figures out for people."""
    kind = result["quantization"]
    weights = result["dtype"] if kind is None else f"{kind} weights"
    table = make_table(
        "",
        "tokens/s",
        "step ms (p50)",
        "tokens/s with prefill",
        title=f"{result['model']}, {weights}, threads: {result['threads']}",
        caption=f"copy {result['copy_gb_per_s']:.1f} GB/s, "
        f"product {result['product_gflop_per_s']:,.0f} GFLOP/s",
    )
    for row in result["decode"]:
        table.add_row(
            f"decode, batch {row['batch_size']}",
            f"{row['tokens_per_s']:,.1f}",
            f"{row['step_ms_p50']:.3f}",
            f"{row['total_tokens_per_s']:,.1f}",
        )
    prefill = result["prefill"]
    table.add_row(f"prefill of {prefill['len']}", f"{prefill['tokens_per_s']:,.1f}", "", "")
    return table
