"""Frames: how a message of any closed schema travels over a stream of bytes.

Rules: a frame is the length of its payload, then the payload: msgpack, with the tag of its struct.
A stream that ends, inside a frame or not, has no more frames.
Must not know: any schema, what is at the other end.
"""

from __future__ import annotations

import asyncio
import struct
from typing import BinaryIO

import msgspec

LENGTH = struct.Struct(">I")  # bytes of the payload that follows

_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: msgspec.Struct) -> bytes:
    """Return the frame of a message."""
    payload = _encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


def read_frame(stream: BinaryIO) -> bytes | None:
    """Return the next payload of a blocking stream; None when it has ended."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(header)
    payload = stream.read(size)
    return payload if len(payload) == size else None


async def receive_frame(stream: asyncio.StreamReader) -> bytes | None:
    """Return the next payload of a stream of the event loop; None when it has ended."""
    try:
        (size,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
        return await stream.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
