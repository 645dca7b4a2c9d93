"""FastServe as a contender: the engine of `fastserve bench offline`, asked row by row.

    python -m benchmarks.fastserve_contender MODEL --threads 2 --max-tokens 4096 --max-seqs 32
        [--load-format dummy] [--quantization int8]

Must not know: what it is compared with.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.contender import serve
from fastserve.bench.offline import Offline
from fastserve.core.request import Arrival, SamplingParams
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.launch.engine import open_engine
from fastserve.settings.engine import EngineConfig

DTYPE = "bfloat16"


def first_tokens(offline: Offline, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the greedy token after each prompt."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, seed=0)
    engine = offline.engine
    handles = [engine.add(Arrival(prompt, params)) for prompt in prompts]
    found: dict[int, int] = {}
    while not engine.is_idle:
        for update in engine.step():
            found.update((update.handle, sample.token_id) for sample in update.samples)
    return [found[handle] for handle in handles]


def with_cpu_s(measure: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Return what was measured, and the processor time that this process took for it."""
    started = time.process_time()
    measured = measure()
    return {**measured, "cpu_s": time.process_time() - started}


def main() -> None:
    """Load the model and answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True, help="of one step")
    parser.add_argument("--max-seqs", type=int, required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--quantization")
    args = parser.parse_args()
    config = EngineConfig(
        model=args.model,
        dtype=DTYPE,
        load_format=args.load_format,
        quantization=args.quantization,
        num_threads=args.threads,
        max_num_batched_tokens=args.max_tokens,
        max_num_seqs=args.max_seqs,
    )
    engine, info = open_engine(config)
    # Not before: how the threads of torch wait is settled by open_engine before it loads torch.
    from fastserve.bench.floors import Floors

    quiet_garbage_collector()  # as the engine process does
    offline = Offline(engine, info, config.seed)
    floors = Floors(info.dtype, info.device, args.threads)

    def decode(batch_size: int, input_len: int, output_len: int) -> dict[str, float]:
        return with_cpu_s(lambda: offline.decode(batch_size, input_len, output_len)._asdict())

    def prefill(length: int) -> dict[str, float]:
        return with_cpu_s(lambda: {"tokens_per_s": offline.prefill(length)})

    answers: dict[str, Any] = {
        "describe": lambda: {"dtype": info.dtype, "threads": args.threads},
        "first_tokens": lambda prompts: {"tokens": first_tokens(offline, prompts)},
        "decode": decode,
        "prefill": prefill,
        "floors": lambda: {
            "copy_gb_per_s": floors.copy_gb_per_s(),
            "product_gflop_per_s": floors.product_gflop_per_s(),
        },
    }
    try:
        serve(answers)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
