"""What `bench serve` sends and when: lengths, ids and arrivals, drawn from one seed or a trace.

Rules: prompts are token ids of exact length; a chat's are words, about one token each, and what the
server counts is what is reported. Must not know: HTTP, time that passes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastserve.bench.serve_config import ServeBenchConfig
from fastserve.settings.option import ConfigError
from fastserve.sim.trace_file import read_trace
from fastserve.sim.workload import HASH_ID_TOKENS, Workload

SMALL_WINDOW = 8192  # below it a model is small, and so are its requests
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


class Planned(NamedTuple):
    """One request: when it is due, in seconds from the start, and what it asks for."""

    due_s: float
    prompt_token_ids: list[int]
    num_output_tokens: int


class Shape(NamedTuple):
    """How many random requests, and their lengths in tokens."""

    num_prompts: int
    input_len: int
    output_len: int


USUAL = Shape(1000, 1024, 128)  # vllm bench serve's


def shape_of(config: ServeBenchConfig, window: int | None) -> Shape:
    """Return what is asked for, and where nothing is, what suits a model with this window.

    Raises ConfigError for lengths that the window cannot hold.
    """
    usual = USUAL
    if window is not None and window < SMALL_WINDOW:
        usual = Shape(100, max(1, window // 16), max(1, window // 32))
    shape = Shape(
        config.num_prompts or usual.num_prompts,
        config.random_input_len or usual.input_len,
        config.random_output_len or usual.output_len,
    )
    most = 1 + config.random_range_ratio
    prompt = config.random_prefix_len + int(shape.input_len * most)
    answer = int(shape.output_len * most) if config.ignore_eos else 1
    if window is not None and prompt + answer > window:
        raise ConfigError(
            f"--random-input-len, --random-output-len: {prompt} + {answer} tokens exceed the "
            f"model's window of {window}"
        )
    return shape


def plan_requests(config: ServeBenchConfig, window: int | None = None) -> list[Planned]:
    """Return the requests to a model with this window, in order of arrival.

    Raises ConfigError for a trace that cannot be read and for lengths beyond the window.
    """
    rng = random.Random(config.seed)
    if config.trace is None:
        count, input_len, output_len = shape_of(config, window)
        prefix = random_ids(rng, config.random_prefix_len, config)
        prompts = [prefix + random_ids(rng, drawn(rng, input_len, config), config)
                   for _ in range(count)]  # fmt: skip
        outputs = [drawn(rng, output_len, config) for _ in range(count)]
        due = [0.0] * count
    else:
        trace = read_trace(Path(config.trace), config.num_prompts)
        prompts = [traced_ids(trace, row, rng, config) for row in range(len(trace.arrived_at))]
        outputs = trace.output_tokens.tolist()
        due = (trace.arrived_at - trace.arrived_at[0]).tolist()
    if config.request_rate != float("inf"):
        gaps = arrivals(config)
        due = [next(gaps) for _ in prompts]
    return [Planned(*row) for row in zip(due, prompts, outputs, strict=True)]


def renewed(request: Planned, config: ServeBenchConfig, rng: random.Random) -> Planned:
    """Return a request of the same lengths with other ids, so that no cache knows its prompt."""
    ids = random_ids(rng, len(request.prompt_token_ids), config)
    return request._replace(prompt_token_ids=ids)


def drawn(rng: random.Random, length: int, config: ServeBenchConfig) -> int:
    """Draw a length around the one asked for."""
    spread = config.random_range_ratio
    return max(1, rng.randint(int(length * (1 - spread)), int(length * (1 + spread))))


def random_ids(rng: random.Random, count: int, config: ServeBenchConfig) -> list[int]:
    """Draw token ids."""
    return rng.choices(range(config.random_vocab_size), k=count)


def traced_ids(
    trace: Workload, row: int, rng: random.Random, config: ServeBenchConfig
) -> list[int]:
    """Return the prompt of a row: equal hash ids are equal tokens, the rest are its own."""
    ids: list[int] = []
    for hash_id in () if trace.hash_ids is None else trace.hash_ids[row]:
        ids += random_ids(random.Random(f"{config.seed} {hash_id}"), HASH_ID_TOKENS, config)
    length = int(trace.prompt_tokens[row])
    return ids[:length] + random_ids(rng, max(0, length - len(ids)), config)


def arrivals(config: ServeBenchConfig) -> Iterator[float]:
    """Yield arrival times of the rate and the burstiness asked for, the first at once."""
    rng = random.Random(config.seed + 1)
    scale = 1.0 / (config.request_rate * config.burstiness)
    now = 0.0
    while True:
        yield now
        now += rng.gammavariate(config.burstiness, scale)


def body_of(request: Planned, config: ServeBenchConfig, model: str) -> dict[str, Any]:
    """Return the body of a request."""
    sampling = {name: getattr(config, name) for name in SAMPLING}
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name, value in sampling.items() if value is not None},
    }
    if config.ignore_eos:
        body["ignore_eos"] = True
    if config.is_chat:
        words = " ".join(f"w{token_id}" for token_id in request.prompt_token_ids)
        body["messages"] = [{"role": "user", "content": words}]
        body["max_completion_tokens"] = request.num_output_tokens
    else:
        body["prompt"] = request.prompt_token_ids
        body["max_tokens"] = request.num_output_tokens
    return {**body, **config.extra_fields()}
