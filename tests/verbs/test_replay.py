"""`fastserve replay`: a live engine's journal gives the same plans, and a forged one does not."""

from __future__ import annotations

import json

import pytest

from fastserve import cli
from fastserve.core.request import Arrival, SamplingParams
from fastserve.launch.engine import open_engine
from fastserve.settings.engine import EngineConfig
from tests.failing_step import REASON, fail_once
from tests.fresh_cache import make_fresh_cache


@pytest.fixture(scope="module")
def live_journal(tmp_path_factory):
    """Return the journal of a real engine: it preempts, aborts, refuses, fails, stops early."""
    folder = tmp_path_factory.mktemp("live")
    path = folder / "journal.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", make_fresh_cache(folder))
        engine, _ = open_engine(
            EngineConfig(
                model="demo",
                num_device_blocks=12,
                preemption_mode="recompute",
                num_threads=1,
                max_num_seqs=4,
                scheduling_policy="skip-join-mlfq",
                journal=str(path),
            )
        )
        params = SamplingParams(
            max_tokens=40, ignore_eos=True, seed=1, logit_bias={65: 2.0}, temperature=0.7
        )
        prompts = [list(range(20 + 3 * index, 50 + 5 * index)) for index in range(6)]
        handles = [engine.add(Arrival(prompt, params, client="é")) for prompt in prompts]
        with pytest.raises(ValueError, match="fit"):
            engine.add(Arrival([1] * 10_000, params))
        has_failed = False
        for step in range(10_000):
            if engine.is_idle:
                break
            engine.step()
            if step == 3:
                engine.abort(handles[1])
            if step == 6:
                engine.finish(handles[2], 2)
            if engine.num_requests <= 2 and not has_failed:
                fail_once(engine, patch)
                has_failed = True
        recomputed = engine.stats().scheduler.num_recomputed_tokens
        engine.close()
    assert recomputed > 0
    assert REASON in path.read_text()
    return path


def test_a_live_journal_gives_the_same_plans(live_journal, capsys):
    """Every plan of the real engine comes out again, to the last field."""
    assert cli.main(["replay", str(live_journal)]) == 0
    said = capsys.readouterr().out
    assert "7 requests: all the same" in said


def test_several_runs_in_one_file(live_journal, tmp_path, capsys):
    """A restarted engine's journal follows in the same file; the last line may be cut off."""
    text = live_journal.read_text()
    path = tmp_path / "two.jsonl"
    path.write_text(text + text + text[: len(text) // 2])
    assert cli.main(["replay", str(path)]) == 0
    assert "in 3 runs: all the same" in capsys.readouterr().out


def forged(live_journal, tmp_path, change):
    """Return a copy in which `change` was made to the parsed lines."""
    lines = [json.loads(line) for line in live_journal.read_text().splitlines()]
    change(lines)
    path = tmp_path / "forged.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_changed_plan_is_found(live_journal, tmp_path, capsys):
    """The first difference is shown: which line, what was recorded, what came out."""

    def change(lines):
        plan = next(line for line in lines if line[0] == "schedule" and line[3])
        plan[3][2][0][5] = 7  # another place in the block table

    path = forged(live_journal, tmp_path, change)
    assert cli.main(["replay", str(path)]) == 1
    said = capsys.readouterr().out
    assert "the plan is another one" in said
    assert "recorded:" in said
    assert "replayed:" in said


def test_another_scheduler_gives_other_plans(live_journal, tmp_path, capsys):
    """The same facts under another policy do not give the same plans."""

    def change(lines):
        lines[0][3]["scheduling_policy"] = "fcfs"
        lines[0][3]["max_num_seqs"] = 2

    assert cli.main(["replay", str(forged(live_journal, tmp_path, change))]) == 1
    assert "line " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("hello\n", "line 1 is not JSON"),
        ("[1]\n", "not a line of a journal"),
        ('["add","0x0.0p+0"]\n', "does not begin"),
        ('["open","0x0.0p+0",3,{},{},1,0,null]\n', "line 1: not a line of a journal"),
        ('["open","0x0.0p+0",3,[],{},1,0,null]\n', "line 1: not a line of a journal"),
        ('["open","0x0.0p+0",3,{"eos_token_ids":[]},{},1,0]\n', "line 1: not a line of a journal"),
        ('["open","0x0.0p+0",3,{"eos_token_ids":[]},{},1,0,7]\n', "line 1: not a line of a"),
        ('["open","0x0.0p+0",3,{"eos_token_ids":[]},{},1,0,{"format":0}]\n', "format 0 is not 1"),
        ('["open","0x0.0p+0"]\n', "line 1: not a line of a journal"),
        (
            '["open","0x0.0p+0",{},{},1,0]\n',
            "line 1: a journal of another format: no number, not 3",
        ),
        ('["open","0x0.0p+0",1,{},{},1]\n', "line 1: a journal of another format: 1, not 3; the"),
        ('["open","noon",3,{},{},1,0,null]\n', "line 1: not a line of a journal"),
        ('["open",12.5,3,{},{},1,0,null]\n', "line 1: not a line of a journal"),
        ('["open","0x1p+99999",3,{},{},1,0,null]\n', "line 1: not a line of a journal"),
        ('{"object":"error"}\n', "line 1: not a line of a journal"),
        ("[" * 100_000 + "\n", "line 1 is not JSON"),
        ("\0\n", "line 1 is not JSON"),
        ("\udcff\udcfe\n", "not a text file"),
    ],
)
def test_what_is_no_journal_is_refused(tmp_path, capsys, text, words):
    """One line, exit code 2."""
    path = tmp_path / "j.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert cli.main(["replay", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastserve: error: {path}: ")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["missing", ""])
def test_a_missing_file_or_a_folder(tmp_path, capsys, name):
    """It is named, in one line."""
    assert cli.main(["replay", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastserve: error: {tmp_path / name}: ")
    assert said.count("\n") == 1


def test_a_journal_cut_off_anywhere(live_journal, tmp_path):
    """What is whole of it is replayed; a cut in the first line leaves nothing."""
    text = live_journal.read_text()
    path = tmp_path / "cut.jsonl"
    first = text.index("\n")
    for length in (1, first // 2, first + 1, first + 40, len(text) // 8):
        path.write_text(text[:length])
        assert cli.main(["replay", str(path)]) == (2 if length < first else 0)


@pytest.mark.parametrize("kind", ["unknown", "broken"])
def test_lines_that_mean_nothing(live_journal, tmp_path, capsys, kind):
    """A line of an unknown kind, or one that lacks fields."""

    def change(lines):
        line = next(line for line in lines if line[0] == "schedule")
        line[0] = "dance" if kind == "unknown" else "update"
        del line[3:]

    assert cli.main(["replay", str(forged(live_journal, tmp_path, change))]) == 2
    assert "not a line of a journal" in capsys.readouterr().err
