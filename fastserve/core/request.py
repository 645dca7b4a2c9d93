"""One request as the core sees it: what was asked, how far it has come, and why it ended.

Rules: a request has no phases. `num_computed_tokens` catches up with `num_tokens`, so prefill,
chunked prefill, decode, prefix hits and recomputation are one rule. The memory room writes `table`
and `num_computed_tokens` and begins and ends epochs; the scheduler writes everything else.
Must not know: text (stop strings are only carried), the API's numbers of requests, tensors,
wall-clock time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:  # the torch rooms import this module, and are to load nothing of memory with it
    from fastserve.core.memory.table import BlockTable


Handle = NewType("Handle", int)
"""Names a request within one engine: counted up from 0, and known to core, executor and worker."""

NO_HANDLE = Handle(-1)


class FinishReason(StrEnum):
    """Why a request ended; the values are OpenAI's `finish_reason` where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn and when to stop; vLLM's names and defaults.

    Raises ValueError naming the field when a value is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Refuse values that no sampler can honour."""
        for name, is_valid, rule in (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "finite and non-negative"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "-1 or 0 (off), or at least 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]"),
            ("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "in [1e-6, 1e6]"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "non-negative"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or self.prompt_logprobs >= 0,
                "non-negative",
            ),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens >= 0, "non-negative"),
            (
                "min_tokens",
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                "at most max_tokens",
            ),
            (
                "logit_bias",
                all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values()),
                "within [-100, 100]",
            ),
            ("stop", "" not in self.stop_strings, "free of empty strings"),
        ):
            if not is_valid:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, whether one or several were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def of_choice(self, index: int) -> SamplingParams:
        """Return those of choice `index` of a prompt: it draws by seed + index, within 64 bits.

        Where the prompt is scored, the first choice brings its scores for all.
        """
        if index == 0:
            return self
        seed = None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63
        return dataclasses.replace(self, seed=seed, prompt_logprobs=None)

    def ending_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Return the ids after which an output is complete, given those of the model."""
        own = frozenset(self.stop_token_ids)
        return own if self.ignore_eos else own | eos_token_ids

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < 1e-5

    @property
    def has_penalty(self) -> bool:
        """Whether ids that were seen count less."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is taken as the model has it, and nothing else is asked."""
        is_changed = self.logit_bias or self.min_tokens or self.has_penalty
        return self.is_greedy and not is_changed and self.logprobs is None


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of a request when it is added: all that the core is told of it.

    The same value travels from the API over the wire to the scheduler, its journal and a replay.
    `prompt_token_ids` is kept as a tuple or a range, which cannot be changed afterwards. A policy
    learns and decides from what stands here: what it may know of a request is a field here.
    Requests with different `cache_salt` share no KV, however equal their ids or hashes are.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    age_s: float = 0.0  # since it arrived, when it is added: clocks of two processes may differ
    output_token_ids: Sequence[int] = ()  # generated in an earlier process, to go on from
    block_hashes: Sequence[bytes] = ()  # of the prompt's full blocks, where ids do not give them
    priority: int = 0
    client: str = ""
    cache_salt: str = ""
    tenant: str = ""  # who is to be given a fair share, together with all that is theirs

    def __post_init__(self) -> None:
        """Copy what could be changed from outside."""
        for name in ("prompt_token_ids", "output_token_ids", "block_hashes"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, range)):
                object.__setattr__(self, name, tuple(value))


class Request:
    """Progress of one request.

    `num_tokens` ids are known; `num_computed_tokens` have KV that is confirmed;
    `num_scheduled_tokens` counts the steps in flight too, and `num_pending_samples` of these will
    append an id. Times are seconds of the engine's clock. `last_ran_at` is when its last step
    ended, or when it was taken in; `attained_s` are the device seconds of all its steps.
    """

    __slots__ = (
        "arrived_at",
        "attained_s",
        "block_hashes",
        "chain_start",
        "client",
        "epoch",
        "first_scheduled_at",
        "first_token_at",
        "handle",
        "last_ran_at",
        "max_computed_tokens",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_lost_tokens",
        "num_pending_samples",
        "num_preemptions",
        "num_prompt_tokens",
        "num_recomputed_tokens",
        "num_scheduled_tokens",
        "num_scored_tokens",
        "num_swaps",
        "num_tokens",
        "output_token_ids",
        "params",
        "priority",
        "prompt_token_ids",
        "queue_s",
        "steps_in_flight",
        "stop_reason",
        "stop_token_ids",
        "swap_s",
        "table",
        "tenant",
    )

    def __init__(
        self,
        handle: Handle,
        arrival: Arrival,
        now: float = 0.0,
        *,
        max_output_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.handle = handle
        self.prompt_token_ids = arrival.prompt_token_ids
        self.output_token_ids = list(arrival.output_token_ids)
        self.params = arrival.params
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.max_num_tokens = self.num_prompt_tokens + max_output_tokens
        self.stop_token_ids = stop_token_ids
        self.priority = arrival.priority
        self.client = arrival.client
        self.tenant = arrival.tenant
        self.arrived_at = now - arrival.age_s
        self.chain_start = _chain_start(arrival.cache_salt)
        self.block_hashes = [_salted(self.chain_start, item) for item in arrival.block_hashes]
        self.num_tokens = self.num_prompt_tokens + len(self.output_token_ids)
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_pending_samples = 0
        self.steps_in_flight = 0
        self.epoch = 0
        self.table: BlockTable | None = None
        self.stop_reason: int | None = None
        self.first_scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.last_ran_at = now
        self.attained_s = 0.0
        self.queue_s = arrival.age_s
        self.max_computed_tokens = 0  # over all epochs
        self.num_scored_tokens = 0
        self.num_lost_tokens = 0  # of the epochs before this one
        self.num_preemptions = 0
        self.num_swaps = 0
        self.swap_s = 0.0
        self.num_recomputed_tokens = 0
        self.num_cached_tokens = 0

    @property
    def num_output_tokens(self) -> int:
        """Number of generated ids known so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        """Tokens whose KV is neither computed nor in flight, the unfinished sample included."""
        return self.num_tokens + self.num_pending_samples - self.num_scheduled_tokens

    @property
    def is_at_length_limit(self) -> bool:
        """Whether every sample that `max_num_tokens` allows is known or in flight."""
        return self.num_tokens + self.num_pending_samples >= self.max_num_tokens

    @property
    def is_recomputing(self) -> bool:
        """Whether this epoch has not yet computed more than the earlier ones had."""
        return self.epoch > 0 and self.num_computed_tokens <= self.num_lost_tokens

    def begin(self, table: BlockTable, num_computed_tokens: int) -> None:
        """Start an epoch's KV in a table whose first tokens are computed already."""
        self.table = table
        self.num_computed_tokens = num_computed_tokens
        self.num_scheduled_tokens = num_computed_tokens

    def restart(self) -> None:
        """End the epoch: its KV is gone. Steps in flight still are, but yield nothing."""
        self.epoch += 1
        self.num_lost_tokens = self.max_computed_tokens
        self.table = None
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_pending_samples = 0

    def token_ids(self, start: int, stop: int) -> Sequence[int]:
        """Return the known ids at positions [start, stop); shorter where ids are not known yet."""
        split = self.num_prompt_tokens
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        if stop <= split:
            return self.prompt_token_ids[start:stop]
        return (*self.prompt_token_ids[start:], *self.output_token_ids[: stop - split])

    def append(self, token_id: int) -> None:
        """Add one sampled id."""
        self.output_token_ids.append(token_id)
        self.num_tokens += 1

    def block_hash(self, index: int, block_size: int) -> bytes:
        """Return the chained sha256 over the salt and the ids of blocks 0..index, all known."""
        hashes = self.block_hashes
        if len(hashes) <= index:
            first = len(hashes) * block_size
            ids = memoryview(array("q", self.token_ids(first, (index + 1) * block_size))).cast("B")
            num_bytes = 8 * block_size
            previous = hashes[-1] if hashes else self.chain_start
            for start in range(0, len(ids), num_bytes):
                digest = hashlib.sha256(previous)
                digest.update(ids[start : start + num_bytes])
                previous = digest.digest()
                hashes.append(previous)
        return hashes[index]


def _chain_start(salt: str) -> bytes:
    """Return what the first block of a chain is hashed behind.

    It comes of another function than the hashes of blocks: a salt that spells the ids of a block
    would otherwise begin where the chain of that block goes on.
    """
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass")).digest() if salt else b""


def _salted(chain_start: bytes, block_hash: bytes) -> bytes:
    """Return a hash that came with a request, as the chain of its salt has it."""
    return hashlib.sha256(chain_start + block_hash).digest() if chain_start else block_hash
