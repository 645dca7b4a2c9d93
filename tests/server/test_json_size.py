"""What is counted of a JSON text before it is parsed."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from fastserve.server.json_size import JsonSize, json_size

NO_LIMIT = 2**30


@pytest.mark.parametrize(
    ("text", "num_parts", "num_keys"),
    [
        ("{}", 1, 0),
        ('{"a": 1}', 2, 1),
        ("[1, 2, 3]", 3, 0),
        ("[[5], [5]]", 4, 0),
        ('"[1, 2], {:}"', 1, 0),
        (r'["\", [", "\\", [], "\\\"[["]', 8, 0),
    ],
)
def test_structure_is_counted_and_text_is_not(text: str, num_parts: int, num_keys: int) -> None:
    """Escaped quotes do not end a string, and escaped backslashes escape nothing."""
    assert json_size(text.encode(), NO_LIMIT) == (num_parts, num_keys)


def counted(value: Any) -> JsonSize:
    """Count by walking through a value."""
    if isinstance(value, str):
        return JsonSize(1, 0)
    if not isinstance(value, list | dict):
        return JsonSize(0, 0)
    parts = [counted(item) for item in (value.values() if isinstance(value, dict) else value)]
    num_keys = len(value) if isinstance(value, dict) else 0
    num_parts = 1 + max(0, len(value) - 1) + num_keys + sum(part.num_parts for part in parts)
    return JsonSize(num_parts, num_keys + sum(part.num_keys for part in parts))


def made_up(rng: random.Random, depth: int) -> Any:
    """Return a random value, with strings that look like structure."""
    kind = rng.choice(("text", "number", "list", "object") if depth else ("text", "number"))
    if kind == "text":
        return "".join(rng.choices('\\"[]{},:aé\n', k=rng.randrange(8)))
    if kind == "number":
        return rng.choice((None, True, 1.5, 10**9))
    items = [made_up(rng, depth - 1) for _ in range(rng.randrange(5))]
    return items if kind == "list" else {f'{i}"\\': item for i, item in enumerate(items)}


@pytest.mark.parametrize("is_ascii", [False, True])
def test_any_value_is_counted_right(is_ascii: bool) -> None:
    """Against a walk through it, for 500 of them."""
    rng = random.Random(0)
    for _ in range(500):
        value = made_up(rng, 4)
        assert json_size(json.dumps(value, ensure_ascii=is_ascii).encode(), 2**20) == counted(value)


@pytest.mark.parametrize("item", [b"[5],", b'"",', b'{"a":1},', b"\\\\", b'\\"', b"5,", b"aaaa"])
def test_counting_is_quick(item: bytes) -> None:
    """4 MiB of anything, in a fraction of the time that parsing them takes."""
    content = item * (2**22 // len(item))
    began = time.thread_time()
    size = json_size(content, 2**17)
    assert time.thread_time() - began < 0.5
    assert item[:1] in b"\\a" or size.num_parts > 2**17
