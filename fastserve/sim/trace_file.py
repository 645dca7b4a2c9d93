"""Reads traces: `.csv`, `.csv.gz`, `.jsonl`, `.jsonl.gz` with one request a row.

Columns `arrived_at,prompt_tokens,output_tokens`, and where they are present `max_tokens`,
`client_id`, `tenant_id`, `source`, `hash_ids`, `session_id` and `think_s`; others are passed over.
Rules: whatever is wrong is one line that names the file and the row; nothing is repaired in
silence. Must not know: what the trace is for.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.sim.workload import HASH_ID_TOKENS, Workload, WorkloadError

NUMBERS = ("arrived_at", "prompt_tokens", "output_tokens")
LABELS = {"client_id": "client", "tenant_id": "tenant", "source": "source"}
"""Columns of text, and what a Workload calls them."""


def read_trace(path: Path, num_requests: int | None = None) -> Workload:
    """Return the workload of a file, or its first `num_requests` rows.

    Raises WorkloadError when the file or a row of it cannot be used.
    """
    columns: dict[str, list[Any]] = {}
    try:
        for line, row in enumerate(_rows(path), start=1):
            if num_requests is not None and line > num_requests:
                break
            _append(columns, _checked(row, f"{path}: row {line}"), f"{path}: row {line}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path}: {_reason(error)}") from error
    if not columns:
        raise WorkloadError(f"{path}: the trace has no rows")
    return _workload(columns, path)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows as mappings from column to value."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".csv", ".jsonl")):
        raise WorkloadError(f"{path}: a trace is a .csv, .csv.gz, .jsonl or .jsonl.gz file")
    with path.open("rb") as raw:
        binary = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        if name.endswith(".csv"):
            yield from csv.DictReader(text)
            return
        for line, content in enumerate(text, start=1):
            try:
                row = json.loads(content)
            except ValueError as error:
                raise WorkloadError(f"{path}: row {line}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise WorkloadError(f"{path}: row {line}: not a JSON object")
            yield row


def _checked(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of one row, each of its type."""
    for name in NUMBERS:
        if row.get(name) is None:
            raise WorkloadError(f"{where}: no {name!r}")
    values: dict[str, Any] = {
        "arrived_at": _number(row["arrived_at"], "arrived_at", where),
        "prompt_tokens": _count(row["prompt_tokens"], "prompt_tokens", where),
        "output_tokens": _count(row["output_tokens"], "output_tokens", where),
    }
    if row.get("max_tokens") not in (None, ""):
        values["max_tokens"] = _count(row["max_tokens"], "max_tokens", where)
        if values["max_tokens"] < values["output_tokens"]:
            raise WorkloadError(f"{where}: output_tokens exceed max_tokens")
    for column, name in LABELS.items():
        if row.get(column) is not None:
            values[name] = str(row[column])
    if row.get("hash_ids") is not None:
        values["hash_ids"] = _hash_ids(row["hash_ids"], values["prompt_tokens"], where)
    if row.get("session_id") is not None:
        values["session_id"] = _whole(row["session_id"], "session_id", where)
        values["think_s"] = _number(row.get("think_s", 0.0), "think_s", where)
    return values


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise WorkloadError(f"{where}: {name} is {value!r}, not a number of at least 0")
    return number


def _whole(value: Any, name: str, where: str) -> int:
    number = _number(value, name, where)
    if number != int(number) or number >= 2**53:
        raise WorkloadError(f"{where}: {name} is {value!r}, not a whole number")
    return int(number)


def _count(value: Any, name: str, where: str) -> int:
    number = _whole(value, name, where)
    if number < 1:
        raise WorkloadError(f"{where}: {name} is {value!r}, and at least 1 is needed")
    return number


def _hash_ids(value: Any, prompt_tokens: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > -(-prompt_tokens // HASH_ID_TOKENS):
        raise WorkloadError(
            f"{where}: hash_ids must be a list with one id per {HASH_ID_TOKENS} prompt tokens"
        )
    return tuple([_whole(item, "hash_ids", where) for item in value])


def _append(columns: dict[str, list[Any]], values: Mapping[str, Any], where: str) -> None:
    if columns and values.keys() != columns.keys():
        odd = sorted(values.keys() ^ columns.keys())[0]
        raise WorkloadError(f"{where}: {odd!r} is in some rows and not in others")
    arrivals = columns.get("arrived_at")
    if arrivals and values["arrived_at"] < arrivals[-1]:
        raise WorkloadError(
            f"{where}: the trace is not sorted: arrived_at {values['arrived_at']:g} after "
            f"{arrivals[-1]:g}"
        )
    for name, value in values.items():
        columns.setdefault(name, []).append(value)


def _workload(columns: Mapping[str, list[Any]], path: Path) -> Workload:
    def ints(name: str) -> Any:
        return np.array(columns[name], np.int64) if name in columns else None

    def values(name: str) -> Any:
        return tuple(columns[name]) if name in columns else None

    return Workload(
        arrived_at=np.array(columns["arrived_at"], np.float64),
        prompt_tokens=ints("prompt_tokens"),
        output_tokens=ints("output_tokens"),
        max_tokens=ints("max_tokens"),
        client=values("client"),
        tenant=values("tenant"),
        source=values("source"),
        hash_ids=values("hash_ids"),
        session_id=ints("session_id"),
        think_s=np.array(columns["think_s"], np.float64) if "think_s" in columns else None,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, gzip.BadGzipFile):
        return "not a gzip file"
    if isinstance(error, EOFError | zlib.error):
        return "the gzip file is damaged or cut off"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    return getattr(error, "strerror", None) or str(error)
