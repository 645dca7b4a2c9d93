"""OpenVINO GenAI as a contender: its continuous batching, asked row by row.

    benchmarks/openvino/.venv/bin/python -m benchmarks.openvino.contender DIRECTORY --threads 2 …

Rules: tokens in, tokens out, greedy, of exact length; figures are what they are in `fastserve bench
offline`. Prompts share no prefix. Must not know: what it is compared with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.contender import serve

CACHE_GB = 1  # of KV, allocated at the start; the largest batch of the larger model needs a tenth
PROPERTIES: dict[str, Any] = {
    "PERFORMANCE_HINT": "LATENCY",  # one stream that has all threads
    "INFERENCE_PRECISION_HINT": "bf16",
    "KV_CACHE_PRECISION": "bf16",
}


class Pipeline:
    """Runs batches, each with prompts of its own."""

    def __init__(
        self, directory: Path, threads: int, max_tokens: int, max_seqs: int, is_bound: bool
    ) -> None:
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.max_num_batched_tokens = max_tokens
        scheduling.max_num_seqs = max_seqs
        scheduling.cache_size = CACHE_GB
        scheduling.dynamic_split_fuse = True
        scheduling.enable_prefix_caching = False
        chosen = {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": is_bound}
        self.properties = {**PROPERTIES, **chosen}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(directory), scheduling, "CPU", self.properties
        )
        self._numbers = itertools.count()
        self._random = random.Random(0)
        self._vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]

    def decode(self, batch_size: int, input_len: int, output_len: int) -> dict[str, float]:
        """Run `batch_size` requests that arrive together."""
        prompts = [self._draw(input_len) for _ in range(batch_size)]
        started = time.monotonic()
        ends, outputs = self._run(prompts, output_len)
        if len(ends) != output_len:  # the first step is to bring all first tokens
            raise RuntimeError(f"{len(ends)} steps for {output_len} tokens of each request")
        gaps = [later - sooner for sooner, later in itertools.pairwise(ends)]
        tokens = sum(map(len, outputs))
        return {
            "tokens_per_s": (tokens - batch_size) / (ends[-1] - ends[0]),
            "total_tokens_per_s": tokens / (ends[-1] - started),
            "step_ms_p50": statistics.median(gaps) * 1e3,
        }

    def prefill(self, length: int) -> dict[str, float]:
        """Return the prompt tokens a second of one prompt."""
        prompt = self._draw(length)
        started = time.monotonic()
        ends, _ = self._run([prompt], 1)
        return {"tokens_per_s": length / (ends[-1] - started)}

    def first_tokens(self, prompts: Sequence[Sequence[int]]) -> dict[str, list[int]]:
        """Return the greedy token after each prompt."""
        _, outputs = self._run(prompts, 1)
        return {"tokens": [tokens[0] for tokens in outputs]}

    def _draw(self, length: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(length)]

    def _run(
        self, prompts: Sequence[Sequence[int]], output_len: int
    ) -> tuple[list[float], list[list[int]]]:
        """Return when each step ended, and the tokens of each request."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_len
        config.ignore_eos = True
        config.do_sample = False
        handles = [
            self._pipeline.add_request(
                next(self._numbers), openvino.Tensor(np.array([prompt], dtype=np.int64)), config
            )
            for prompt in prompts
        ]
        ends = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            ends.append(time.monotonic())
        outputs = [handle.read_all()[0].generated_ids for handle in handles]
        if any(len(tokens) != output_len for tokens in outputs):
            raise RuntimeError(f"answers of {sorted(map(len, outputs))} tokens, not {output_len}")
        return ends, outputs


def main() -> None:
    """Load the model and answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True, help="of one step")
    parser.add_argument("--max-seqs", type=int, required=True)
    parser.add_argument("--unbound", action="store_true", help="threads may run on any core")
    args = parser.parse_args()
    pipeline = Pipeline(
        args.directory, args.threads, args.max_tokens, args.max_seqs, is_bound=not args.unbound
    )
    answers: dict[str, Any] = {
        "describe": lambda: {
            "version": openvino_genai.__version__,
            "properties": pipeline.properties,
        },
        "first_tokens": pipeline.first_tokens,
        "decode": pipeline.decode,
        "prefill": pipeline.prefill,
    }
    serve(answers)


if __name__ == "__main__":
    main()
