"""Counts what a JSON text is made of, before anything is made of it.

Rules: a count costs a few passes over the bytes at the speed of memory, and no object for each
value. Whether the text is valid is not asked: a parser says that. Must not know: what it is about.
"""

from __future__ import annotations

from typing import NamedTuple

STRUCTURE = b'"[]{},:'
NO_STRUCTURE = bytes(byte for byte in range(256) if byte not in STRUCTURE)


class JsonSize(NamedTuple):
    """How many strings, containers and commas there are together; how many keys of objects."""

    num_parts: int
    num_keys: int


def json_size(content: bytes | bytearray, max_parts: int) -> JsonSize:
    """Count; where there are more than `max_parts` strings, what stands in them may count too."""
    structure = content.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, NO_STRUCTURE)
    num_strings = structure.count(b'"') // 2
    if num_strings <= max_parts:
        # The pieces between quotes are by turns outside and inside of a string.
        structure = b"".join(structure.split(b'"')[::2])
    num_others = sum(map(structure.count, (b"[", b"{", b",")))
    return JsonSize(num_strings + num_others, structure.count(b":"))
