"""Frames taken apart, as the other end of a connection does."""

from __future__ import annotations

import io

from fastserve.wire.frames import read_frame


def payload_of(frame: bytes) -> bytes:
    """Return what a whole frame carries."""
    payload = read_frame(io.BytesIO(frame))
    assert payload is not None
    return payload
