"""Every setting, once: the source of flags, YAML keys, LLM(**kw), and their validation.

Rules: frozen, resolved once. What is measured (block counts, the model's window) is a result that
is passed on, never written back. An option exists only once it has an effect.
Must not know: torch, the model's files, the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

POLICIES = (
    "fcfs",
    "orca",
    "static",
    "mlfq",
    "skip-join-mlfq",
    "artifact-mlfq",
    "fixed-priority",
)
SIMULATED_POLICIES = (*POLICIES, "srpt")  # srpt must be told the output lengths
PREEMPTION_MODES = ("recompute", "defer")
SIMULATED_PREEMPTION_MODES = (*PREEMPTION_MODES, "ideal")  # ideal needs a link that does not exist


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message is one line for the user."""


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[Any] = (),
    aliases: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
) -> Any:
    """Declare a setting: its default, help text and range."""
    return field(
        default=default,
        metadata={
            "help": text,
            "choices": tuple(choices),
            "aliases": tuple(aliases),
            "minimum": minimum,
            "maximum": maximum,
            "positional": positional,
        },
    )


def check_ranges(config: Any) -> None:
    """Raise ConfigError for the first field outside its declared choices or range."""
    for spec in dataclasses.fields(config):
        value, meta = getattr(config, spec.name), spec.metadata
        if value is None:
            continue
        flag = "--" + spec.name.replace("_", "-")
        if meta["choices"] and value not in meta["choices"]:
            allowed = ", ".join(map(str, meta["choices"]))
            raise ConfigError(f"{flag}: {value!r} is not one of: {allowed}")
        if meta["minimum"] is not None and not value >= meta["minimum"]:
            raise ConfigError(f"{flag}: {value} is below the minimum of {meta['minimum']}")
        if meta["maximum"] is not None and not value <= meta["maximum"]:
            raise ConfigError(f"{flag}: {value} is above the maximum of {meta['maximum']}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The model, its memory and its schedule."""

    model: str = option(
        "demo",
        "directory or hub id of a Hugging Face model; none: the bundled demo model",
        positional=True,
    )
    tokenizer: str | None = option(None, "directory or hub id of the tokenizer (the model's own)")
    revision: str | None = option(None, "hub revision of the model")
    dtype: str = option(
        "auto", "weights and KV", choices=("auto", "float32", "bfloat16", "float16")
    )
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    load_format: str = option(
        "auto", "weights from files, or random ones", choices=("auto", "dummy")
    )
    max_model_len: int | None = option(
        None, "longest prompt + output, in tokens (the model's window)", minimum=2
    )
    seed: int = option(0, "base of the seeds of requests that bring none")
    generation_config: str = option(
        "auto",
        "sampling defaults: the model's generation_config.json, or none (vllm)",
        choices=("auto", "vllm"),
    )

    max_num_seqs: int | None = option(
        None, "most sequences in one step (256; 64 on a CPU)", minimum=1
    )
    max_num_batched_tokens: int | None = option(
        None, "most tokens in one step (2048; 512 on a CPU)", minimum=1
    )
    max_live_seqs: int | None = option(None, "most requests that hold KV at once", minimum=1)
    enable_chunked_prefill: bool = option(True, "split a long prefill over several steps")
    enable_prefix_caching: bool = option(True, "share the KV of equal prompt beginnings")

    block_size: int = option(16, "tokens in one KV block", minimum=1, maximum=1024)
    num_device_blocks: int | None = option(
        None,
        "KV blocks on the device, instead of what memory allows",
        aliases=("--num-gpu-blocks-override",),
        minimum=1,
    )
    gpu_memory_utilization: float = option(
        0.9, "share of a CUDA device's memory to use", minimum=0.01, maximum=1.0
    )
    kv_cache_memory_bytes: int | None = option(
        None, "KV bytes on the device, instead of what memory allows", minimum=1
    )

    scheduling_policy: str = option(
        "skip-join-mlfq", "order in which requests run", choices=POLICIES
    )
    starvation_limit: float = option(
        0.3, "seconds without running after which MLFQ promotes to level 0 (α)", minimum=0.0
    )
    mlfq_quantum: float | None = option(
        None, "seconds of level 0 (the fitted minimum iteration time)", minimum=1e-9
    )
    mlfq_quantum_ratio: float = option(
        2.0, "quantum of a level over that of the level above", minimum=1.01
    )
    priority_aging: float = option(
        10.0, "seconds without running that raise a request by one priority class", minimum=1e-3
    )
    preemption_mode: str = option(
        "recompute",
        "what becomes of the KV of a request that loses its place",
        choices=PREEMPTION_MODES,
    )
    max_recompute_share: float = option(
        0.1,
        "device time that newcomers may make others recompute, over all of it; inf: the paper's",
        minimum=0.0,
    )

    tensor_parallel_size: int = option(1, "devices per layer", choices=(1,), aliases=("-tp",))
    pipeline_parallel_size: int = option(1, "stages of layers", choices=(1,), aliases=("-pp",))
    data_parallel_size: int = option(1, "copies of the model", choices=(1,), aliases=("-dp",))
    distributed_executor_backend: str = option("uni", "how workers are started", choices=("uni",))
    num_threads: int | None = option(
        None, "threads of one CPU operation (cores - 1 beside a server)", minimum=1
    )
    profile: str | None = option(
        None, "file with the fitted step times (measured at first start and cached)"
    )
    journal: str | None = option(None, "file to write every fact and plan to, for replay")

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        check_ranges(self)
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs is not None and tokens is not None and tokens < seqs:
            raise ConfigError(
                f"--max-num-batched-tokens: {tokens} is below --max-num-seqs {seqs}; "
                "every running sequence needs one token a step"
            )
        if (
            not self.enable_chunked_prefill
            and tokens is not None
            and self.max_model_len is not None
            and tokens < self.max_model_len
        ):
            raise ConfigError(
                f"--max-num-batched-tokens: {tokens} is below --max-model-len "
                f"{self.max_model_len}, and without chunked prefill a prompt runs in one step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateConfig(EngineConfig):
    """The simulated machine, its workload, and what is written about it.

    What the engine cannot do yet, but virtual time can, is declared anew.
    """

    hardware: str | None = option(
        None, "name of a device (a100-40g, a100-80g, h100, h200), or FILE of `fastserve profile`"
    )
    engine: str | None = option(None, "overheads of another engine (vllm-2023)")
    step_overhead: str | None = option(
        None, "FIXED_S,PER_SEQ_S: seconds each step costs beyond the device (0,0)"
    )
    tensor_parallel_size: int = option(1, "devices per layer", minimum=1, aliases=("-tp",))
    pipeline_parallel_size: int = option(1, "stages of layers", minimum=1, aliases=("-pp",))
    lookahead: int = option(0, "steps submitted behind an unfinished one", choices=(0, 1))

    trace: str | None = option(
        None, "FILE.csv, .csv.gz, .jsonl or .jsonl.gz with arrived_at, prompt_tokens, output_tokens"
    )
    num_requests: int | None = option(None, "first rows of the trace to run (all)", minimum=1)
    rate_scale: float = option(1.0, "times as many arrivals a second", minimum=1e-6)
    arrival_cv: float | None = option(
        None, "redraw the gaps, Gamma with this coefficient of variation (1: Poisson)", minimum=0.0
    )
    arrival_jitter: float = option(
        0.0, "seconds of uniform noise on each arrival, for traces with coarse clocks", minimum=0.0
    )
    closed_loop: bool = option(
        False, "a session's next turn comes think_s after the answer, not when the trace says"
    )
    oversize: str = option("error", "rows beyond the window", choices=("error", "drop", "clip"))
    seed: int = option(0, "of redrawn arrivals", minimum=0)

    scheduling_policy: str = option(
        "skip-join-mlfq", "order in which requests run", choices=SIMULATED_POLICIES
    )
    compare: str | None = option(None, "several policies over the same trace: P,Q,R")
    preemption_mode: str = option(
        "recompute",
        "what becomes of the KV of a request that loses its place",
        choices=SIMULATED_PREEMPTION_MODES,
    )

    output: str | None = option(None, "file to write the figures to, as JSON")
    plot: str | None = option(None, "PNG to draw JCT, queues and KV over time in")
    trace_events: str | None = option(None, "file for Perfetto: every step, as JSON")

    @classmethod
    def flags(cls) -> frozenset[str]:
        """Return the fields that simulate: its own, and those that shape a schedule or a pool."""
        own = set(cls.__annotations__)
        shaping = {spec.name for spec in dataclasses.fields(SchedulerConfig)}
        machine = {
            "model", "dtype", "num_device_blocks", "gpu_memory_utilization",
            "kv_cache_memory_bytes", "journal",
        }  # fmt: skip
        inherited = {spec.name for spec in dataclasses.fields(EngineConfig)}
        return frozenset(own | ((shaping | machine) & inherited))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP face."""

    host: str = option("127.0.0.1", "address to bind")
    port: int = option(8000, "port to bind; 0 picks a free one", minimum=0, maximum=65535)
    api_key: str | None = option(None, "bearer token that requests must carry")
    served_model_name: str | None = option(None, "model name that clients use")
    chat_template: str | None = option(None, "file with a Jinja chat template")
    max_queued_requests: int = option(
        10_000, "requests in the server beyond which new ones get 429", minimum=1
    )
    max_body_bytes: int = option(16 * 2**20, "largest request body; more gets 413", minimum=1024)
    disable_log_requests: bool = option(False, "no line per request")
    log_level: str = option(
        "info",
        "least severe message that is logged",
        choices=("debug", "info", "warning", "error"),
    )

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("--api-key: an empty key would let everybody in")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """How `generate` and `chat` draw tokens; unset ones are the model's own."""

    max_tokens: int | None = option(
        None, "most tokens of one answer (what the window leaves)", minimum=1
    )
    temperature: float | None = option(None, "0 takes the most likely token", minimum=0.0)
    top_p: float | None = option(None, "share of probability to draw from", maximum=1.0)
    top_k: int | None = option(None, "number of tokens to draw from; 0: all", minimum=-1)
    min_p: float | None = option(
        None, "least probability, relative to the best token's", minimum=0.0, maximum=1.0
    )
    repetition_penalty: float | None = option(None, "above 1 discourages repetition")

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerBenchConfig:
    """What `bench scheduler` measures."""

    waiting: int = option(10_000, "most requests that wait beside the running ones", minimum=0)
    running: int = option(256, "most requests that run in one step", minimum=1)
    steps: int = option(300, "timed steps of each row", minimum=10)
    scheduling_policy: str = option(
        "skip-join-mlfq", "order in which requests run", choices=POLICIES
    )
    output: str | None = option(None, "file to write the rows to, as JSON")

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopConfig:
    """What `top` watches."""

    url: str = option("http://127.0.0.1:8000", "address of the server", positional=True)
    interval: float = option(1.0, "seconds between two looks", minimum=0.1)
    once: bool = option(False, "print one picture and end")

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the core needs, with every default resolved; lengths in tokens, times in seconds."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int = 16
    max_live_seqs: int | None = None
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    scheduling_policy: str = "skip-join-mlfq"
    starvation_limit: float = 0.3
    mlfq_quantum: float | None = None
    mlfq_quantum_ratio: float = 2.0
    priority_aging: float = 10.0
    preemption_mode: str = "recompute"
    max_recompute_share: float = 0.1
    num_slots: int = 1
    lookahead: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    is_strict: bool = False  # no progress raises, with the story of every request

    @classmethod
    def resolve(
        cls,
        config: EngineConfig,
        *,
        max_model_len: int,
        is_cpu: bool,
        num_slots: int,
        lookahead: int,
        eos_token_ids: frozenset[int],
    ) -> SchedulerConfig:
        """Fill the defaults that depend on the device and on the model's window."""
        max_num_seqs = config.max_num_seqs or min(
            64 if is_cpu else 256, config.max_num_batched_tokens or 2**30
        )
        tokens = config.max_num_batched_tokens or max(512 if is_cpu else 2048, max_num_seqs)
        if not config.enable_chunked_prefill and config.max_num_batched_tokens is None:
            tokens = max(tokens, max_model_len)
        if not config.enable_chunked_prefill and tokens < max_model_len:
            raise ConfigError(
                f"--max-num-batched-tokens: {tokens} is below the window of {max_model_len} "
                "tokens, and without chunked prefill a prompt runs in one step"
            )
        return cls(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=tokens,
            max_model_len=max_model_len,
            block_size=config.block_size,
            max_live_seqs=config.max_live_seqs,
            enable_chunked_prefill=config.enable_chunked_prefill,
            enable_prefix_caching=config.enable_prefix_caching,
            scheduling_policy=config.scheduling_policy,
            starvation_limit=config.starvation_limit,
            mlfq_quantum=config.mlfq_quantum,
            mlfq_quantum_ratio=config.mlfq_quantum_ratio,
            priority_aging=config.priority_aging,
            preemption_mode=config.preemption_mode,
            max_recompute_share=config.max_recompute_share,
            num_slots=num_slots,
            lookahead=lookahead,
            eos_token_ids=eos_token_ids,
        )


def field_type(owner: type, name: str) -> type:
    """Return the plain type of a field: `int` for `int | None`."""
    hint = typing.get_type_hints(owner)[name]
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    assert isinstance(hint, type)
    return hint


def add_arguments(
    parser: argparse.ArgumentParser,
    owner: type,
    *,
    has_positional: bool = True,
    only: Container[str] | None = None,
) -> None:
    """Give `parser` one flag per field of a config class, spelled as the field with dashes.

    Absent flags leave no attribute, so that a YAML file or the class supplies the value.
    With `has_positional` false, the positional of the class is a flag too. `only` names the fields
    that get a flag, where not all do.
    """
    group = parser.add_argument_group((owner.__doc__ or "").split("\n")[0].rstrip("."))
    for spec in dataclasses.fields(owner):
        if only is not None and spec.name not in only:
            continue
        meta, kind = spec.metadata, field_type(owner, spec.name)
        text = meta["help"].replace("%", "%%")
        if spec.default is not None and kind is not bool:
            text += f" (default: {spec.default})"
        if meta["positional"] and has_positional:
            parser.add_argument(
                spec.name,
                nargs="?",
                type=kind,
                default=argparse.SUPPRESS,
                help=text,
                metavar=spec.name.upper(),
            )
            continue
        names = ["--" + spec.name.replace("_", "-"), *meta["aliases"]]
        if kind is bool:
            group.add_argument(
                *names,
                dest=spec.name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{text} (default: {spec.default})",
            )
        else:
            group.add_argument(
                *names,
                dest=spec.name,
                type=kind,
                default=argparse.SUPPRESS,
                help=text,
                choices=meta["choices"] or None,
                metavar=None if meta["choices"] else kind.__name__.upper(),
            )


def from_mapping(owner: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Build a config from names and values, checking names and types.

    Raises ConfigError naming `source` and the key.
    """
    known = {spec.name for spec in dataclasses.fields(typing.cast(Any, owner))}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown option {key!r}")
        kind = field_type(owner, key)
        is_number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        is_plain = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if value is not None and not (is_number or is_plain):
            raise ConfigError(
                f"{source}: {key} must be {kind.__name__}, got {type(value).__name__} {value!r}"
            )
    return owner(**values)
