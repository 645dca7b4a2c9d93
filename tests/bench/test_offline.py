"""`fastserve bench offline`: what it counts, worked out by hand, and what it writes, on a model."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from fastserve import cli
from fastserve.bench.config import OfflineBenchConfig
from fastserve.bench.offline import Decode, Offline, with_room
from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.messages import SchedulerOutput
from fastserve.engine.engine import Engine
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.clock import VirtualClock
from fastserve.wire.engine_messages import EngineInfo
from tests.checkpoints import SHAPE
from tests.core.harness import UNIT_COST
from tests.fake_executor import FakeExecutor
from tests.fresh_cache import make_fresh_cache

INFO = EngineInfo(
    model="fake", max_model_len=128, max_request_tokens=128, vocab_size=1000, block_size=4,
    num_device_blocks=64, num_host_blocks=0, block_bytes=1000, eos_token_ids=frozenset(),
    dtype="float32", device="cpu", cost_model=UNIT_COST, max_num_seqs=8,
    enable_prefix_caching=True,
)  # fmt: skip


def step_s(plan: SchedulerOutput) -> float:
    """Take 3 s for a step with a prefill in it, half a second for others."""
    return 3.0 if any(work.num_tokens > 1 for work in plan.work) else 0.5


def make_offline(max_num_batched_tokens: int, lookahead: int = 0) -> Offline:
    """Return the bench before a fake device."""
    clock = VirtualClock()
    config = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens, max_model_len=128,
        block_size=4, scheduling_policy="fcfs", lookahead=lookahead, is_strict=True,
    )  # fmt: skip
    costs = CostModel(base_s=0.9, prefill_token_s=0.01, decode_seq_s=0.1)
    executor = FakeExecutor(clock, 4, lookahead=lookahead, step_s=step_s)
    return Offline(Engine(build_scheduler(config, costs, 64), executor, clock), INFO, seed=0)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_decoding_is_timed_without_prefill(lookahead: int) -> None:
    """Both prompts in one step of 3 s, then four steps of half a second with two tokens each."""
    offline = make_offline(16, lookahead)
    assert offline.decode(2, 8, 5) == Decode(8 / 2.0, 10 / 5.0, 500.0)
    assert offline.engine.is_idle


def test_what_is_generated_beside_a_prefill_does_not_count() -> None:
    """The first request has three tokens by the time the second, chunked, has its first."""
    assert make_offline(8).decode(2, 8, 5) == Decode(6 / 2.0, 10 / 8.5, 500.0)


def test_no_prompt_is_a_prefix_hit() -> None:
    """Batches and prefills, repeated, compute every token of every prompt."""
    offline = make_offline(64)
    for _ in range(3):
        offline.decode(3, 9, 2)
        assert offline.prefill(30) == 30 / 3.0
    scheduler = offline.engine.scheduler
    assert scheduler.stats().num_computed_prompt_tokens == 3 * (3 * 9 + 30)
    scheduler.check()


def test_flags_that_are_not_given_make_room() -> None:
    """One step holds any batch and its prefill, and flags that are given stand."""
    bench = OfflineBenchConfig(batch_size="4,100", input_len=50, prefill_len=6000)
    made = with_room(bench, EngineConfig())
    assert (made.max_num_seqs, made.max_num_batched_tokens) == (100, 6000)
    made = with_room(bench, EngineConfig(max_num_seqs=128, max_num_batched_tokens=256))
    assert (made.max_num_seqs, made.max_num_batched_tokens) == (128, 256)
    with pytest.raises(ConfigError, match="--max-num-seqs: 99 is below the batch size of 100"):
        with_room(bench, EngineConfig(max_num_seqs=99))


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Return flags of a tiny model without weights, for one thread."""
    monkeypatch.setenv("XDG_CACHE_HOME", make_fresh_cache(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(
        json.dumps({**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    return ["--model", str(tmp_path), "--load-format", "dummy", "--num-threads", "1"]


def run(*argv: str) -> int:
    """Run `bench offline`."""
    return cli.main(["bench", "offline", *argv])


def test_a_model_is_measured(tmp_path, capsys, model: Sequence[str]) -> None:
    """Every row is there, beside the floors of the same run and what it was measured on."""
    path = tmp_path / "made" / "figures.json"
    flags = ["--dtype", "bfloat16", "--input-len", "20", "--output-len", "9"]
    flags += ["--batch-size", "3,1", "--prefill-len", "60", "--output", str(path)]
    assert run(*model, *flags) == 0
    result = json.loads(path.read_text())
    assert (result["dtype"], result["threads"], result["device"]) == ("bfloat16", 1, "cpu")
    assert [row["batch_size"] for row in result["decode"]] == [3, 1]
    for row in result["decode"]:
        assert (row["input_len"], row["output_len"]) == (20, 9)
        assert min(row["tokens_per_s"], row["total_tokens_per_s"], row["step_ms_p50"]) > 0
    assert result["prefill"]["len"] == 60
    assert result["prefill"]["tokens_per_s"] > 0
    assert min(result["copy_gb_per_s"], result["product_gflop_per_s"]) > 0
    assert {"commit", "machine", "command", "model", "max_num_batched_tokens"} <= result.keys()
    assert "decode, batch 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", "1,x"], "--batch-size"),
        (["--batch-size", "0"], "--batch-size"),
        (["--output-len", "1"], "--output-len"),
        (["--input-len", "200"], "--input-len and --output-len: 328 tokens exceed 256"),
        (["--input-len", "8", "--prefill-len", "256"], "--prefill-len"),
        (["--prefill-len", "9", "--num-device-blocks", "60"], "need 512 KV blocks"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, model: Sequence[str], flags, words) -> None:
    """In one line, with exit code 2, and before anything is measured."""
    assert run(*model, *flags) == 2
    said = capsys.readouterr()
    *loading, refusal = said.err.splitlines()
    assert words in refusal
    assert all("loading" in line for line in loading)
    assert said.out == ""
