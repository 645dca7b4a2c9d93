"""Trace files: every format that is read, and one line for everything that is wrong."""

from __future__ import annotations

import gzip
import json

import pytest

from fastserve.sim.trace_file import read_trace
from fastserve.sim.workload import WorkloadError

HEADER = "arrived_at,prompt_tokens,output_tokens"


def write(tmp_path, name, content):
    """Write a file, gzipped when its name says so."""
    path = tmp_path / name
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_csv(tmp_path, name):
    """Lengths, times and the source column; columns of other people are passed over."""
    text = f"{HEADER},source,mood\n0.5,3,4,long,x\n1,5,6,short,y\n"
    workload = read_trace(write(tmp_path, name, text))
    assert workload.arrived_at.tolist() == [0.5, 1.0]
    assert workload.prompt_tokens.tolist() == [3, 5]
    assert workload.output_tokens.tolist() == [4, 6]
    assert workload.source == ("long", "short")
    assert workload.max_tokens is None
    assert workload.hash_ids is None


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_jsonl(tmp_path, name):
    """Prefix blocks and sessions come as JSON lines."""
    rows = [
        {"arrived_at": 0, "prompt_tokens": 600, "output_tokens": 4, "hash_ids": [1, 2],
         "session_id": 0, "turn": 0, "think_s": 0.0},
        {"arrived_at": 2.5, "prompt_tokens": 600, "output_tokens": 6, "hash_ids": [1],
         "session_id": 0, "turn": 1, "think_s": 1.5},
    ]  # fmt: skip
    workload = read_trace(write(tmp_path, name, "\n".join(map(json.dumps, rows))))
    assert workload.hash_ids == ((1, 2), (1,))
    assert workload.session_id is not None
    assert workload.session_id.tolist() == [0, 0]
    assert workload.think_s is not None
    assert workload.think_s.tolist() == [0.0, 1.5]


def test_client_id_is_the_client_and_max_tokens_a_limit(tmp_path):
    """Who asks is not where the row is from; a row may carry its own limit."""
    path = write(tmp_path, "t.csv", f"{HEADER},client_id,max_tokens\n0,3,4,13,9\n")
    workload = read_trace(path)
    assert workload.client == ("13",)
    assert workload.source is None
    assert workload.max_tokens is not None
    assert workload.max_tokens.tolist() == [9]


def test_a_client_beside_a_source(tmp_path):
    """Neither hides the other; a number of a JSON line is its digits, an empty one nobody."""
    path = write(tmp_path, "t.csv", f"{HEADER},source,client_id\n0,3,4,chat,13\n1,3,4,code,\n")
    workload = read_trace(path)
    assert workload.client == ("13", "")
    assert workload.source == ("chat", "code")
    row = {"arrived_at": 0, "prompt_tokens": 3, "output_tokens": 4, "client_id": 13}
    assert read_trace(write(tmp_path, "t.jsonl", json.dumps(row))).client == ("13",)


def test_only_the_first_rows_are_read(tmp_path):
    """What lies beyond the rows asked for cannot even be wrong."""
    path = write(tmp_path, "t.csv", f"{HEADER}\n0,3,4\n1,3,4\n2,bad,4\n")
    assert len(read_trace(path, 2)) == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "arrived_at,prompt_tokens\n0,3\n", "row 1: no 'output_tokens'"),
        ("t.csv", f"{HEADER}\n0,3,4\n1,3\n", "row 2: no 'output_tokens'"),
        ("t.csv", f"{HEADER}\n0,-3,4\n", "row 1: prompt_tokens is '-3'"),
        ("t.csv", f"{HEADER}\n0,3,0\n", "row 1: output_tokens is '0'"),
        ("t.csv", f"{HEADER}\n0,3.5,4\n", "prompt_tokens is '3.5', not a whole number"),
        ("t.csv", f"{HEADER}\nnan,3,4\n", "arrived_at is 'nan'"),
        ("t.csv", f"{HEADER}\ninf,3,4\n", "arrived_at is 'inf'"),
        ("t.csv", f"{HEADER}\nsoon,3,4\n", "arrived_at is 'soon'"),
        ("t.csv", f"{HEADER}\n5,3,4\n4,3,4\n", "row 2: the trace is not sorted"),
        ("t.csv", f"{HEADER},max_tokens\n0,3,4,2\n", "output_tokens exceed max_tokens"),
        ("t.csv", f"{HEADER}\n", "no rows"),
        ("t.csv", "", "no rows"),
        ("t.txt", "", "a trace is a .csv"),
        ("t.jsonl", "{", "row 1: not JSON"),
        ("t.jsonl", "[1]", "row 1: not a JSON object"),
        (
            "t.jsonl",
            '{"arrived_at":0,"prompt_tokens":9,"output_tokens":1,"hash_ids":[1,2]}',
            "one id per 512",
        ),
        (
            "t.jsonl",
            '{"arrived_at":0,"prompt_tokens":9,"output_tokens":1,"hash_ids":[1]}\n'
            '{"arrived_at":1,"prompt_tokens":9,"output_tokens":1}',
            "row 2: 'hash_ids' is in some rows",
        ),
    ],
)
def test_complaints_name_file_and_row(tmp_path, name, text, words):
    """Whatever is wrong is one line that says where."""
    path = write(tmp_path, name, text)
    with pytest.raises(WorkloadError) as caught:
        read_trace(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_what_they_are_called(tmp_path):
    """Plain text with a gzip's name, half a gzip, bytes that are no text, no file."""
    text = tmp_path / "a.csv.gz"
    text.write_text(HEADER)
    with pytest.raises(WorkloadError, match="not a gzip"):
        read_trace(text)
    rows = "".join(f"{at},{at % 97 + 1},{at % 89 + 1}\n" for at in range(5000))
    half = write(tmp_path, "b.csv.gz", f"{HEADER}\n{rows}")
    half.write_bytes(half.read_bytes()[:-900])
    with pytest.raises(WorkloadError, match="damaged or cut off"):
        read_trace(half)
    noise = tmp_path / "c.csv"
    noise.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match="not UTF-8"):
        read_trace(noise)
    with pytest.raises(WorkloadError, match="No such file"):
        read_trace(tmp_path / "d.csv")
