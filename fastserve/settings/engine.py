"""The settings of the engine, once: flags, YAML keys, LLM(**kw), their validation.

Rules: frozen, resolved once. What is measured (block counts, the model's window) is a result that
is passed on, never written back. An option exists only once it has an effect.
Must not know: torch, the model's files, the machine.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from fastserve.settings.option import ConfigError, check_ranges, option

__all__ = [
    "POLICIES",
    "PREEMPTION_MODES",
    "EngineConfig",
]

POLICIES = (
    "learned",
    "fcfs",
    "orca",
    "static",
    "mlfq",
    "skip-join-mlfq",
    "artifact-mlfq",
    "fixed-priority",
    "hrrn",
    "sjf",
)
SWAPPING_MODES = ("proactive", "proactive-by-level", "reactive")
PREEMPTION_MODES = (*SWAPPING_MODES, "recompute", "defer")


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
        "auto",
        "weights and KV",
        choices=("auto", "float32", "bfloat16", "float16", "float", "half"),
    )
    quantization: str | None = option(
        None,
        "int8: weights of eight bits, a scale for each output channel, made of bfloat16 ones while "
        "they are loaded; on a CPU with AVX-512's bfloat16 products and --dtype auto or bfloat16",
        choices=("int8",),
    )
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    load_format: str = option(
        "auto", "weights from files, or random ones", choices=("auto", "dummy")
    )
    check_weights: bool = option(
        False, "refuse weights that are not finite numbers, by name; loading takes longer"
    )
    max_model_len: int | None = option(
        None, "longest prompt + output, in tokens (the model's window)", minimum=2
    )
    seed: int = option(0, "seed of what is drawn for requests that set none")
    generation_config: str = option(
        "auto",
        "sampling defaults: the model's generation_config.json, or none (vllm)",
        choices=("auto", "vllm"),
    )

    max_num_seqs: int | None = option(
        None, "most sequences in one step (256; 64 on a CPU)", minimum=1, maximum=2**20
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

    scheduling_policy: str = option("learned", "order in which requests run", choices=POLICIES)
    latency_objective: float = option(
        0.3,
        "what learned makes short: 0: the mean completion time; 1: the mean time per token (β)",
        minimum=0.0,
        maximum=1.0,
    )
    boost: float = option(
        0.75,
        "how far learned moves short work ahead, in the work that an arrival finds; 0: fcfs (κ)",
        minimum=0.0,
    )
    max_pause: float = option(
        1.0, "seconds after which learned lets a stream that holds its KV go on", minimum=0.0
    )
    fairness: bool = option(
        False,
        "share the machine equally among tenants, of whom each API key is one; learned orders the "
        "requests of each",
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
    priority_quantum: float = option(
        1.0,
        "seconds of steps that a request so raised is given before it goes back to its class",
        minimum=0.0,
    )
    preemption_mode: str = option(
        "proactive",
        "what becomes of the KV of a request that loses its place",
        choices=PREEMPTION_MODES,
    )
    swap_space: float = option(
        4.0,
        "GiB of host memory for KV per rank, in modes that swap; 0: none, and KV is recomputed",
        minimum=0.0,
        maximum=1e6,
    )
    swap_bandwidth: float | None = option(
        None, "GB/s at most to copy KV at, each way (as fast as it goes)", minimum=1e-6
    )
    write_through: bool | None = option(
        None, "copy KV to the host ahead of need (proactive modes do, reactive does not)"
    )
    max_recompute_share: float = option(
        0.1,
        "share of device time to recompute KV taken by requests without any; inf: no limit (paper)",
        minimum=0.0,
    )

    tensor_parallel_size: int = option(
        1, "ranks that share each layer", minimum=1, maximum=1024, aliases=("-tp",)
    )
    pipeline_parallel_size: int = option(
        1, "stages of layers", minimum=1, maximum=1024, aliases=("-pp",)
    )
    pipeline_layers: str | None = option(
        None, "layers of each stage, as N,N,... (by what they cost)"
    )
    data_parallel_size: int = option(
        1,
        "engines with a copy of the model each, behind one server",
        aliases=("-dp",),
        minimum=1,
        maximum=64,
    )
    distributed_executor_backend: str | None = option(
        None,
        "where ranks run: uni: in the engine's process; mp: in processes of these hosts; ray: "
        "where Ray has room (uni for one rank, mp for several)",
        choices=("uni", "mp", "ray"),
    )
    nnodes: int = option(1, "hosts with an equal part of the ranks each", minimum=1, maximum=1024)
    node_rank: int = option(0, "which of them this is; host 0 serves", minimum=0)
    master_addr: str | None = option(None, "address of host 0 at which the ranks of others join")
    master_port: int | None = option(
        None, "and the port (29501; any free one over Ray)", minimum=1, maximum=65535
    )
    cluster_secret_file: str | None = option(
        None,
        "file with the secret that all hosts share (environment: FASTSERVE_CLUSTER_SECRET; over "
        "Ray: drawn)",
    )
    num_threads: int | None = option(
        None,
        "threads of one CPU operation (cores - 1 beside a server, divided among ranks)",
        minimum=1,
        maximum=4096,
    )
    cpu_kernels: str = option(
        "auto",
        "fused CPU kernels, compiled here, or plain torch; auto: kernels where they can be built",
        choices=("auto", "native", "torch"),
    )
    deterministic: bool = option(
        False, "a token's logits and KV are the same bits in any batch, resumed or not; slower"
    )
    enforce_eager: bool = option(False, "run decodes on CUDA without capturing graphs of them")
    profile: str | None = option(
        None, "file with the fitted step times (measured at first start and cached)"
    )
    journal: str | None = option(None, "file to write every fact and plan to, for replay")

    @property
    def num_ranks(self) -> int:
        """Processes or threads that share one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def layers_by_stage(self) -> tuple[int, ...] | None:
        """The layers asked for in each stage; None where they are split by cost."""
        if self.pipeline_layers is None:
            return None
        try:
            return tuple(int(word) for word in self.pipeline_layers.split(","))
        except ValueError:
            raise ConfigError(
                f"--pipeline-layers {self.pipeline_layers}: N,N,... is expected"
            ) from None

    @property
    def host_kv_bytes(self) -> int:
        """Bytes of host memory asked for KV: none in modes that do not swap."""
        is_swapping = self.preemption_mode in SWAPPING_MODES
        return int(self.swap_space * 2**30) if is_swapping else 0

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        check_ranges(self)
        self._check_layout()
        self._check_hosts()
        if self.fairness and self.scheduling_policy != "learned":
            raise ConfigError(
                f"--fairness: not with --scheduling-policy {self.scheduling_policy}; learned has it"
            )
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

    def _check_layout(self) -> None:
        counts, num_stages = self.layers_by_stage, self.pipeline_parallel_size
        if counts is not None and len(counts) != num_stages:
            raise ConfigError(
                f"--pipeline-layers {self.pipeline_layers}: {len(counts)} counts for "
                f"--pipeline-parallel-size {num_stages}"
            )
        if self.distributed_executor_backend == "uni" and self.num_ranks > 1:
            raise ConfigError(
                f"--distributed-executor-backend uni: one process cannot be {self.num_ranks} ranks"
            )

    def _check_hosts(self) -> None:
        if self.master_addr is not None and is_wildcard(self.master_addr):
            raise ConfigError(
                f"--master-addr {self.master_addr}: that is every address of a host; name the one "
                "that the other hosts reach"
            )
        if self.data_parallel_size > 1 and self.master_port is not None:
            raise ConfigError(
                f"--master-port {self.master_port}: each of {self.data_parallel_size} replicas "
                "needs a port of its own; without the flag it takes one"
            )
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"--node-rank {self.node_rank}: --nnodes is {self.nnodes}")
        if self.nnodes == 1:
            return
        if self.master_addr is None:
            raise ConfigError(f"--nnodes {self.nnodes}: needs --master-addr")
        if self.num_ranks % self.nnodes:
            raise ConfigError(
                f"--nnodes {self.nnodes}: {self.num_ranks} ranks cannot be divided equally"
            )
        if self.distributed_executor_backend not in (None, "mp"):
            raise ConfigError(
                f"--nnodes {self.nnodes}: not with --distributed-executor-backend "
                f"{self.distributed_executor_backend}"
            )
        if self.data_parallel_size > 1:
            raise ConfigError(f"--nnodes {self.nnodes}: not with --data-parallel-size")


def is_wildcard(address: str) -> bool:
    """Whether an address is a number that means all addresses of a host."""
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return not address.strip("0.")  # short for 0.0.0.0
