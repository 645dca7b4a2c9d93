"""What `fastserve bench serve` takes: the flags of `vllm bench serve`, and a few more.

Must not know: how anything is measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from fastserve.settings.option import ConfigError, check_ranges, option

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBenchConfig:
    """What `bench serve` sends, and what it reports."""

    backend: str = option(
        "openai",
        "shape of requests: completions of token ids, or chats of words",
        choices=("openai", "openai-chat", "vllm"),
    )
    label: str | None = option(None, "name of the run in the result (the backend)")
    base_url: str | None = option(None, "address of the server, instead of host and port")
    host: str = option("127.0.0.1", "host of the server")
    port: int = option(8000, "port of the server", minimum=1, maximum=65535)
    endpoint: str | None = option(
        None, "path of requests (/v1/completions; /v1/chat/completions for openai-chat)"
    )
    model: str | None = option(None, "model name to ask for (the server's first)")
    api_key: str | None = option(None, "bearer token (the variable OPENAI_API_KEY)")

    dataset_name: str = option("random", "where prompts come from", choices=("random",))
    num_prompts: int | None = option(
        None,
        "requests to send (1000; 100 where the window is below 8192; all of a trace)",
        minimum=1,
    )
    random_input_len: int | None = option(
        None,
        "tokens of a prompt (1024; a 16th of a window below 8192)",
        aliases=("--input-len",),
        minimum=1,
    )
    random_output_len: int | None = option(
        None,
        "tokens to ask for (128; a 32nd of a window below 8192)",
        aliases=("--output-len",),
        minimum=1,
    )
    random_range_ratio: float = option(
        0.0, "lengths are drawn from length × (1 ± ratio)", minimum=0.0, maximum=0.999
    )
    random_prefix_len: int = option(0, "tokens before each prompt that all share", minimum=0)
    random_vocab_size: int = option(
        1000, "random token ids are below this; the model needs as many", minimum=2
    )
    trace: str | None = option(
        None, "FILE with arrived_at, prompt_tokens, output_tokens, as for `simulate`"
    )

    request_rate: float = option(
        math.inf, "requests a second; inf: all at once, or when the trace says", minimum=1e-6
    )
    burstiness: float = option(
        1.0, "shape of the Gamma gaps between requests: 1 Poisson, below burstier", minimum=1e-3
    )
    max_concurrency: int | None = option(None, "most requests under way", minimum=1)
    num_warmups: int = option(0, "requests to send and forget beforehand", minimum=0)
    seed: int = option(0, "of lengths, ids and gaps", minimum=0)
    measure_alone: int = option(
        0, "requests to send once more, one at a time, for their slowdown", minimum=0
    )

    ignore_eos: bool = option(True, "answers have exactly the length asked for")
    temperature: float | None = option(0.0, "0 takes the most likely token", minimum=0.0)
    top_p: float | None = option(None, "share of probability to draw from", maximum=1.0)
    top_k: int | None = option(None, "number of tokens to draw from", minimum=-1)
    min_p: float | None = option(None, "least probability, relative to the best", minimum=0.0)
    extra_body: str | None = option(None, "further fields of every request, as a JSON object")

    percentile_metrics: str = option(
        ",".join(METRICS), f"metrics to give percentiles of: {','.join(METRICS)}"
    )
    metric_percentiles: str = option("99", "percentiles to give: P,P,P")
    save_result: bool = option(False, "write the result to a file named after the run")
    save_detailed: bool = option(False, "write every request's lengths and times too")
    result_dir: str | None = option(None, "folder of that file (the working directory)")
    result_filename: str | None = option(None, "name of that file")
    output: str | None = option(None, "file to write the result to, without the flags above")
    disable_tqdm: bool = option(False, "no progress bar")

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)
        self.chosen_metrics()
        self.percentiles()
        self.extra_fields()

    @property
    def is_chat(self) -> bool:
        """Whether requests are chats."""
        return self.backend == "openai-chat"

    def chosen_metrics(self) -> tuple[str, ...]:
        """Return the metrics whose percentiles are wanted."""
        names = tuple(self.percentile_metrics.split(","))
        for name in names:
            if name not in METRICS:
                allowed = ", ".join(METRICS)
                raise ConfigError(f"--percentile-metrics: {name!r} is not one of: {allowed}")
        return names

    def percentiles(self) -> tuple[float, ...]:
        """Return the percentiles that are wanted."""
        try:
            found = tuple(float(part) for part in self.metric_percentiles.split(","))
        except ValueError:
            found = (math.nan,)
        if not all(0 <= percent <= 100 for percent in found):
            raise ConfigError(
                f"--metric-percentiles: {self.metric_percentiles!r} are not numbers from 0 to 100"
            )
        return found

    def extra_fields(self) -> dict[str, Any]:
        """Return the fields of --extra-body."""
        if self.extra_body is None:
            return {}
        try:
            fields = json.loads(self.extra_body)
        except ValueError as error:
            raise ConfigError(f"--extra-body: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError("--extra-body: not a JSON object")
        return fields
