"""Jobs: what they write, and that a process of their own changes nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from fastserve.core.journal import Journal
from fastserve.sim.job import Job, run_job, run_side_by_side
from fastserve.sim.simulator import simulate
from tests.sim.machines import MACHINE, make_workload, small_config

WORKLOAD = make_workload(*[(0.5 * index, 10 + index, 12) for index in range(20)])


def make_job(policy="skip-join-mlfq", **changes):
    """Return a job of a few requests."""
    config = small_config(scheduling_policy=policy)
    return Job(config=config, machine=MACHINE, workload=WORKLOAD, **changes)


def test_a_job_writes_its_journal_and_its_trace(tmp_path):
    """The hash in the report is that of the file."""
    journal, trace = tmp_path / "j.jsonl", tmp_path / "t.json"
    told: list[int] = []
    result = run_job(
        make_job(journal=journal, trace_events=trace, has_timeline=True, settings={"a": 1}),
        told.append,
    )
    digest = hashlib.sha256(journal.read_bytes()).hexdigest()
    assert result.report["journal_sha256"] == digest
    assert result.report["config"] == {"a": 1}
    assert len(json.loads(trace.read_text())) > 20
    assert result.timeline
    assert told[-1] == len(WORKLOAD)


def test_the_fast_journal_has_the_lines_of_the_plain_one():
    """Two writers, one text: but for the first line, whose small floats they may spell apart."""
    job = make_job()
    lines: list[str] = []
    journal = Journal(lines.append)
    journal.open(0.0, job.config, MACHINE.cost_model, MACHINE.num_device_blocks)
    simulate(job.config, MACHINE, WORKLOAD, observers=lambda scheduler: [journal])
    assert run_job(job).report["journal_sha256"] == journal.sha256
    assert json.loads(lines[0])[0] == "open"


def test_side_by_side_gives_what_one_after_the_other_gives():
    """Only the wall time differs."""
    jobs = [make_job("fcfs"), make_job(), make_job("srpt", has_timeline=True)]
    told: dict[int, int] = {}
    together = run_side_by_side(jobs, 2, told.__setitem__)
    for job, result in zip(jobs, together, strict=True):
        alone = run_job(job)
        assert {**result.report, "wall_s": 0} == {**alone.report, "wall_s": 0}
        assert result.timeline == alone.timeline
        assert (result.outcome.finished_at == alone.outcome.finished_at).all()
    assert told == {0: 20, 1: 20, 2: 20}


def test_a_failure_in_one_process_ends_the_others():
    """The cause is told, and nobody works on for a result that will not be read."""
    told: dict[int, int] = {}
    num_blocks = dataclasses.replace(MACHINE, num_device_blocks=1)
    rows = [(10.0 * index, 10, 50) for index in range(100_000)]
    jobs = [
        dataclasses.replace(make_job(), machine=num_blocks),
        dataclasses.replace(make_job(), workload=make_workload(*rows)),
    ]
    with pytest.raises(ValueError, match="do not hold the window"):
        run_side_by_side(jobs, 2, told.__setitem__)
    assert told.get(1, 0) < len(rows)


def test_replicas_write_a_journal_each(tmp_path):
    """Numbered behind the name that was given; the report's hash is that of their hashes."""
    path = tmp_path / "j.jsonl"
    result = run_job(make_job(journal=path, num_replicas=3))
    journals = [tmp_path / f"j.jsonl.{replica}" for replica in range(3)]
    assert sorted(tmp_path.iterdir()) == journals
    digests = [hashlib.sha256(journal.read_bytes()).hexdigest() for journal in journals]
    assert len(set(digests)) == 3
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert result.report["journal_sha256"] == whole
    assert result.report["completed"] == len(WORKLOAD)
