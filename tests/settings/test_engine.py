"""Settings: validation, resolution, flags, and the page that documents them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from fastserve.bench.config import SchedulerBenchConfig
from fastserve.settings.command_line import add_arguments
from fastserve.settings.engine import EngineConfig
from fastserve.settings.mapping import from_mapping
from fastserve.settings.option import ConfigError, field_type, takes_many
from fastserve.settings.scheduler import SchedulerConfig, StepLimits
from fastserve.settings.server import ServerConfig
from fastserve.verbs.config import TextConfig, TopConfig
from scripts.write_configuration import PAGE, render

WINDOW = 2048
CLASSES = (EngineConfig, ServerConfig, TextConfig, TopConfig, SchedulerBenchConfig)


def resolve(config, *, is_cpu=True):
    """Resolve as a one-slot CPU engine with a window of 2,048 tokens would."""
    limits = StepLimits.resolve(config, WINDOW, is_cpu=is_cpu)
    facts: dict[str, Any] = {"num_slots": 1, "lookahead": 0, "eos_token_ids": frozenset({2})}
    return SchedulerConfig.resolve(config, limits, max_model_len=WINDOW, **facts)


@pytest.mark.parametrize("owner", CLASSES)
def test_defaults_are_valid_and_frozen(owner):
    """Every class can be built bare, and nothing can be changed afterwards."""
    config = owner()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(owner)[0].name, None)


@pytest.mark.parametrize("owner", CLASSES)
def test_every_flag_says_what_it_is(owner):
    """A setting has a help text, and its default passes its own check."""
    for spec in dataclasses.fields(owner):
        assert spec.metadata["help"]
        choices = spec.metadata["choices"]
        assert spec.default is None or not choices or spec.default in choices


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_num_seqs": 0}, "--max-num-seqs: 0 is below the minimum of 1"),
        ({"block_size": 2048}, "--block-size: 2048 is above the maximum of 1024"),
        ({"scheduling_policy": "lifo"}, "--scheduling-policy: 'lifo' is not one of: learned"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization"),
        ({"starvation_limit": float("nan")}, "--starvation-limit"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size"),
        ({"pipeline_layers": "3,x"}, "--pipeline-layers 3,x: N,N,... is expected"),
        (
            {"pipeline_layers": "3,4", "pipeline_parallel_size": 3},
            "--pipeline-layers 3,4: 2 counts for --pipeline-parallel-size 3",
        ),
        (
            {"distributed_executor_backend": "uni", "tensor_parallel_size": 2},
            "--distributed-executor-backend uni: one process cannot be 2 ranks",
        ),
        ({"master_addr": "0.0.0.0"}, "--master-addr 0.0.0.0: that is every address of a host"),
        ({"master_addr": "::"}, "--master-addr ::: that is every address of a host"),
        ({"node_rank": 1}, "--node-rank 1: --nnodes is 1"),
        (
            {"data_parallel_size": 2, "master_port": 80, "distributed_executor_backend": "ray"},
            "--master-port 80: each of 2 replicas needs a port of its own",
        ),
        ({"nnodes": 2}, "--nnodes 2: needs --master-addr"),
        (
            {"nnodes": 2, "master_addr": "10.0.0.1", "tensor_parallel_size": 3},
            "--nnodes 2: 3 ranks cannot be divided equally",
        ),
        (
            {
                "nnodes": 2,
                "master_addr": "10.0.0.1",
                "tensor_parallel_size": 2,
                "distributed_executor_backend": "ray",
            },
            "--nnodes 2: not with --distributed-executor-backend ray",
        ),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, "below --max-num-seqs 8"),
        ({"fairness": True, "scheduling_policy": "fcfs"}, "--fairness: not with --sched"),
        (
            {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": 64,
                "max_model_len": 128,
            },
            "without chunked prefill",
        ),
    ],
)
def test_values_out_of_range_are_named(values, words):
    """The message names the flag and what it allows."""
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("is_cpu", "given", "seqs", "tokens"),
    [
        (True, {}, 64, 512),
        (False, {}, 256, 2048),
        (True, {"max_num_seqs": 4}, 4, 512),
        (True, {"max_num_seqs": 600}, 600, 600),
        (True, {"max_num_batched_tokens": 16}, 16, 16),
        (False, {"max_num_seqs": 8, "max_num_batched_tokens": 32}, 8, 32),
        (True, {"enable_chunked_prefill": False}, 64, 2048),
    ],
)
def test_limits_are_resolved_for_the_device(is_cpu, given, seqs, tokens):
    """What is not given depends on the device, and never contradicts what is."""
    resolved = resolve(EngineConfig(**given), is_cpu=is_cpu)
    assert resolved.max_num_seqs == seqs
    assert resolved.max_num_batched_tokens == tokens


def test_a_window_that_no_step_can_hold_is_refused():
    """Without chunked prefill the budget must hold a whole prompt, whatever the model's window."""
    config = EngineConfig(enable_chunked_prefill=False, max_num_batched_tokens=1024)
    with pytest.raises(ConfigError, match="window of 2048"):
        resolve(config)


def test_resolution_carries_every_shared_setting():
    """A setting that both classes have arrives unchanged."""
    given: dict[str, Any] = {
        "block_size": 32,
        "max_live_seqs": 7,
        "enable_prefix_caching": False,
        "scheduling_policy": "mlfq",
        "latency_objective": 0.75,
        "boost": 0.25,
        "max_pause": 3.5,
        "starvation_limit": 1.5,
        "mlfq_quantum": 0.01,
        "mlfq_quantum_ratio": 3.0,
        "priority_aging": 2.5,
        "priority_quantum": 0.5,
        "preemption_mode": "defer",
        "write_through": False,
        "max_recompute_share": 0.25,
    }
    resolved = resolve(EngineConfig(**given))
    assert {name: getattr(resolved, name) for name in given} == given
    shared = {spec.name for spec in dataclasses.fields(EngineConfig)} & {
        spec.name for spec in dataclasses.fields(SchedulerConfig)
    }
    derived = {"max_num_seqs", "max_num_batched_tokens", "max_model_len", "enable_chunked_prefill"}
    assert shared - derived - {"fairness"} == set(given)
    assert resolve(EngineConfig(fairness=True)).fairness, "which only learned has"


def test_a_default_is_the_engines():
    """What neither the user nor the device decides has one default, that of the flag."""
    bare = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=1, max_model_len=1)
    for spec in dataclasses.fields(EngineConfig):
        if hasattr(bare, spec.name) and spec.default is not None:
            assert getattr(bare, spec.name) == spec.default


@pytest.mark.parametrize("owner", CLASSES)
def test_flags_round_trip(owner):
    """Every setting can be given as a flag and comes back with its own type."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, owner, has_positional=False)
    assert vars(parser.parse_args([])) == {}
    for spec in dataclasses.fields(owner):
        kind, meta = field_type(owner, spec.name), spec.metadata
        flag = "--" + spec.name.replace("_", "-")
        if kind is bool:
            assert vars(parser.parse_args([flag])) == {spec.name: True}
            assert vars(parser.parse_args(["--no-" + flag[2:]])) == {spec.name: False}
            continue
        value = meta["choices"][-1] if meta["choices"] else kind(7)
        for name in (flag, *meta["aliases"]):
            expected = [value] if takes_many(owner, spec.name) else value
            assert vars(parser.parse_args([name, str(value)])) == {spec.name: expected}


def test_mapping_names_and_types_are_checked():
    """Names and types of a file or of LLM(**kw) are checked, and an int may stand for a float."""
    config = from_mapping(EngineConfig, {"starvation_limit": 2, "max_num_seqs": None}, source="x")
    assert config.starvation_limit == 2
    for values, words in (
        ({"max_seqs": 1}, "x: unknown option 'max_seqs'; did you mean max_num_seqs?"),
        ({"zzz": 1}, "x: unknown option 'zzz'"),
        ({"max_num_seqs": 1.0}, "x: max_num_seqs must be int, got float 1.0"),
        ({"seed": True}, "x: seed must be int, got bool True"),
        ({"model": 3}, "x: model must be str, got int 3"),
    ):
        with pytest.raises(ConfigError) as caught:
            from_mapping(EngineConfig, values, source="x")
        assert str(caught.value) == words


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("k1", ("k1",)),
        (["k1", "k2"], ("k1", "k2")),
        ('["k1", "k2"]', ("k1", "k2")),
        (["[1]k"], ("[1]k",)),
        (None, ()),
    ],
)
def test_several_words_come_as_a_word_or_a_list(given, words):
    """One word, a YAML list, and a JSON list in one word mean the same."""
    assert from_mapping(ServerConfig, {"api_key": given}, source="x").api_key == words


@pytest.mark.parametrize(
    "key", ["", " ", "key ", "clé", "k\ny", "k\udce9y", 7, ["key", ""], ["key", 7], {"a": 1}]
)
def test_a_key_that_no_header_can_carry_is_refused(key):
    """It would lock everybody out, or let everybody in."""
    with pytest.raises(ConfigError, match=r"api.key"):
        from_mapping(ServerConfig, {"api_key": key}, source="x")


def test_one_string_is_not_taken_for_its_letters():
    """ServerConfig(api_key="ab") would else have the keys a and b."""
    with pytest.raises(ConfigError, match="--api-key: a tuple"):
        ServerConfig(api_key="ab")  # type: ignore[arg-type]


def test_the_documentation_is_current():
    """docs/configuration.md is what scripts/write_configuration.py writes."""
    assert PAGE.read_text(encoding="utf-8") == render()
