"""`fastserve simulate` from the outside: flags, files, complaints, determinism."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastserve import cli
from fastserve.settings.engine import EngineConfig
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.config import SimulateConfig
from fastserve.sim.job import run_job
from fastserve.verbs.simulate import make_jobs
from tests.sim.test_report import KEYS

HEADER = "arrived_at,prompt_tokens,output_tokens,source"


@pytest.fixture
def trace(tmp_path):
    """Return a trace of 40 requests that come too fast for the machine, one of them too long."""
    rows = [f"{0.1 * at:.1f},{20 + 13 * at % 300},{5 + 31 * at % 90},{at % 2}" for at in range(40)]
    rows[7] = "0.7,1900,400,1"
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def argv(trace, *more):
    """Return a command line."""
    machine = ("--model", "opt-13b", "--hardware", "a100-40g", "--num-device-blocks", "160")
    return ["simulate", *machine, "--trace", str(trace), *more]


def test_one_policy_writes_one_object(trace, tmp_path, capsys):
    """The keys that others rely on, and everything the result depends on."""
    output = tmp_path / "new" / "out.json"
    command = argv(
        trace, "--oversize", "drop", "--rate-scale", "2", "--scheduling-policy", "mlfq",
        "--step-overhead", "0.001,0.0001", "--output", str(output),
    )  # fmt: skip
    assert cli.main(command) == 0
    result = json.loads(output.read_text())
    assert list(result) == [*KEYS, "by_source"]
    assert result["policy"] == "mlfq"
    assert (result["requests"], result["completed"], result["dropped"]) == (40, 39, 1)
    settings = result["config"]
    assert settings["rate_scale"] == 2.0
    assert settings["step_overhead"] == [0.001, 0.0001]
    assert (settings["max_num_seqs"], settings["max_model_len"]) == (256, 2048)
    assert settings["cost_model"]["base_s"] > 0
    assert settings["command"].split()[0] == "fastserve"
    said = capsys.readouterr()
    assert "mlfq" in said.out
    assert "JCT" in said.out
    assert "costs: opt-13b on a100-40g" in said.err


def test_compare_writes_a_list_and_a_file_per_policy(trace, tmp_path):
    """Same trace, several policies, in the order given; a plot, traces and journals beside it."""
    command = argv(
        trace, "--oversize", "clip", "--compare", "fcfs,skip-join-mlfq,srpt",
        "--preemption-mode", "ideal", "--output", str(tmp_path / "out.json"),
        "--plot", str(tmp_path / "p.png"), "--trace-events", str(tmp_path / "t.json"),
        "--journal", str(tmp_path / "j.jsonl"),
    )  # fmt: skip
    assert cli.main(command) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    policies = [result["policy"] for result in results]
    assert policies == ["fcfs", "skip-join-mlfq", "srpt"]
    assert results[2]["jct_s"]["mean"] < results[0]["jct_s"]["mean"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    for policy in policies:
        assert json.loads((tmp_path / f"t.{policy}.json").read_text())
        assert cli.main(["replay", str(tmp_path / f"j.{policy}.jsonl")]) == (
            2 if policy == "srpt" else 0
        )


def test_compare_with_one_policy_is_still_a_list(trace, tmp_path):
    """Whoever compares reads a list."""
    output = tmp_path / "out.json"
    command = argv(trace, "--oversize", "drop", "--compare", "fcfs", "--output", str(output))
    assert cli.main(command) == 0
    assert len(json.loads(output.read_text())) == 1


def test_arrivals_can_be_redrawn(trace, tmp_path):
    """The seed fixes them; jitter and a CV change them; lengths stay."""
    hashes = {}
    for name, more in {
        "logged": (),
        "burst 1": ("--arrival-cv", "4", "--seed", "1"),
        "again": ("--arrival-cv", "4", "--seed", "1"),
        "burst 2": ("--arrival-cv", "4", "--seed", "2"),
        "jitter": ("--arrival-jitter", "3"),
        "memory": ("--kv-cache-memory-bytes", "1000000000"),
    }.items():
        output = tmp_path / "out.json"
        command = argv(trace, "--oversize", "drop", "--output", str(output), *more)
        if name == "memory":
            place = command.index("--num-device-blocks")
            del command[place : place + 2]
        assert cli.main(command) == 0
        hashes[name] = json.loads(output.read_text())["journal_sha256"]
    assert hashes["burst 1"] == hashes["again"]
    assert len(set(hashes.values())) == 5


def test_a_hash_seed_changes_nothing(trace, tmp_path):
    """Two processes with different PYTHONHASHSEED: one journal hash per policy."""
    hashes = []
    for seed in ("1", "2"):
        output = tmp_path / f"{seed}.json"
        command = argv(
            trace, "--oversize", "drop", "--num-requests", "25", "--output", str(output),
            "--compare", "fcfs,skip-join-mlfq",
        )  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "fastserve", *command],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            timeout=100,
        )
        hashes.append([run["journal_sha256"] for run in json.loads(output.read_text())])
    assert hashes[0] == hashes[1]
    assert hashes[0][0] != hashes[0][1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "row 8 needs 1900 + 400 tokens"),
        (("--trace", "/no/such.csv"), "/no/such.csv: No such file"),
        (("--model", "gpt-9"), "gpt-9"),
        (("--hardware", "abacus"), "--hardware abacus: unknown"),
        (("--hardware", "/no/such.json"), "/no/such.json"),
        (("--engine", "nobody"), "--engine nobody"),
        (("--scheduling-policy", "lifo"), "skip-join-mlfq"),
        (("--preemption-mode", "pray"), "recompute"),
        (("--compare", "fcfs,lifo"), "'lifo' is not one of"),
        (("--compare", "fcfs,fcfs"), "given twice"),
        (("--step-overhead", "1"), "FIXED_S,PER_SEQ_S"),
        (("--step-overhead", "1,-1"), "FIXED_S,PER_SEQ_S"),
        (("--step-overhead", "0,0", "--engine", "vllm-2023"), "--engine has its own"),
        (("--closed-loop",), "no session_id"),
        (("--oversize", "drop", "--max-model-len", "8"), "no row fits"),
        (("--rate-scale", "0"), "--rate-scale"),
        (("--output", "/proc/none/out.json"), "--output /proc/none/out.json"),
        (("--output", "/proc/out.json"), "--output /proc/out.json: cannot be written"),
        (("--plot", "/proc/x.png"), "--plot /proc/x.png: cannot be written"),
        (("--oversize", "drop", "--journal", "/proc/none/j"), "--journal /proc/none/j"),
        (("--oversize", "drop", "--trace-events", "/dev/full"), "No space left"),
        (("--oversize", "drop", "--journal", "/dev/full"), "No space left"),
        (("--profile", "x"), "unrecognized"),  # has no effect here: refused
    ],
)
def test_complaints_are_one_line_and_exit_2(trace, capsys, more, words):
    """Whatever is wrong, one line names it before anything runs."""
    code: object
    try:
        code = cli.main(argv(trace, *more))
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    assert code == 2
    *costs, complaint = said.err.splitlines()
    assert complaint.startswith("fastserve: error: ")
    assert [line.partition(":")[0] for line in costs] in ([], ["costs"])
    assert words in complaint


def test_a_bare_command_shows_what_it_does(tmp_path, capsys):
    """It runs, and says which requests it made up, on which machine; the pipe gets no bar."""
    output = tmp_path / "out.json"
    assert cli.main(["simulate", "--num-requests", "30", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert (result["requests"], result["completed"]) == (30, 30)
    said = capsys.readouterr()
    assert "opt-13b on a100-40g, 30 requests" in said.out
    made_up, hint, costs = said.err.splitlines()
    assert made_up.startswith("no --trace: 30 made-up requests, 8 a second")
    assert "--compare" in hint
    assert costs.startswith("costs: opt-13b on a100-40g")


def test_made_up_requests_fill_the_default_machine():
    """So many that requests lose their place and policies differ."""
    [job] = make_jobs(SimulateConfig(), ["skip-join-mlfq"])
    assert len(job.workload) == 500
    assert run_job(job).report["preemptions"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--closed-loop"], "--closed-loop: no session_id in made-up requests"),
        (["--max-model-len", "100"], "made-up requests: row "),
    ],
)
def test_made_up_requests_are_named_in_complaints(capsys, flags, words):
    """As a file would be."""
    assert cli.main(["simulate", *flags]) == 2
    assert words in capsys.readouterr().err


def test_prefix_blocks_need_a_block_size_that_divides(tmp_path, capsys):
    """An id stands for 512 tokens."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrived_at":0,"prompt_tokens":9,"output_tokens":2,"hash_ids":[1]}\n')
    assert cli.main(argv(path, "--block-size", "24")) == 2
    assert "do not divide" in capsys.readouterr().err
    assert cli.main(argv(path, "--block-size", "32")) == 0


def test_too_little_memory_for_one_block(trace, capsys):
    """The size of a block is said."""
    command = argv(trace, "--kv-cache-memory-bytes", "1000")
    place = command.index("--num-device-blocks")
    del command[place : place + 2]
    assert cli.main(command) == 2
    assert "one block takes" in capsys.readouterr().err


def test_a_measured_profile_is_hardware(trace, tmp_path):
    """A file of `fastserve profile` stands for the machine it was written on."""
    profile = tmp_path / "profile.json"
    fingerprint = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "block_size": 16,
                   "dtype": "float32", "device": "a machine"}  # fmt: skip
    costs = {"base_s": 0.01, "prefill_token_s": 1e-4, "decode_seq_s": 1e-3}
    profile.write_text(json.dumps({"fingerprint": fingerprint, "cost_model": costs}))
    output = tmp_path / "out.json"
    command = argv(trace, "--oversize", "drop", "--output", str(output))
    assert cli.main([*command, "--hardware", str(profile)]) == 0
    settings = json.loads(output.read_text())["config"]
    assert settings["cost_model"]["base_s"] == 0.01
    assert "measured" in settings["cost_source"]


def test_every_flag_that_shapes_a_schedule_is_there():
    """What the scheduler is configured with can be simulated, and nothing that has no effect."""
    flags = SimulateConfig.flags()
    shaping = set(SchedulerConfig.__annotations__) & set(EngineConfig.__annotations__)
    assert shaping <= flags
    assert not flags & {"tokenizer", "device", "num_threads", "profile", "load_format"}


def test_replicas_are_simulated_together(trace, tmp_path, capsys):
    """All rows end, sooner than on one machine, and the table says how many machines there are."""
    means = []
    for count in ("1", "2"):
        output = tmp_path / f"{count}.json"
        command = argv(trace, "--oversize", "drop", "--rate-scale", "4", "-dp", count,
                       "--output", str(output))  # fmt: skip
        assert cli.main(command) == 0
        result = json.loads(output.read_text())
        assert result["config"]["data_parallel_size"] == int(count)
        assert result["completed"] == 39
        means.append(result["jct_s"]["mean"])
    assert means[1] < means[0]
    assert "2 × opt-13b on a100-40g" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--plot", "--trace-events"])
def test_pictures_are_of_one_replica(trace, tmp_path, capsys, flag):
    """What would show one of several as if it were all is refused."""
    assert cli.main(argv(trace, "-dp", "2", flag, str(tmp_path / "x"))) == 2
    assert f"error: {flag}: of one engine" in capsys.readouterr().err
