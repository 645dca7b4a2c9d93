"""Frames: what was put in comes out, whole, of blocking streams and of those of the event loop."""

from __future__ import annotations

import asyncio
import io

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fastserve.wire.frames import encode_frame, read_frame, receive_frame
from tests.framing import payload_of


class Said(msgspec.Struct, frozen=True, tag="said"):
    """A message of some schema."""

    text: str


decode = msgspec.msgpack.Decoder(Said).decode


def blocking(data: bytes) -> list[bytes]:
    """Read every payload of a blocking stream."""
    stream = io.BytesIO(data)
    return list(iter(lambda: read_frame(stream), None))


async def of_the_event_loop(data: bytes) -> list[bytes]:
    """Read every payload of a stream that has ended."""
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    payloads = []
    while (payload := await receive_frame(reader)) is not None:
        payloads.append(payload)
    return payloads


@given(st.lists(st.text(max_size=300)), st.data())
def test_frames_are_read_whole_until_the_end(texts: list[str], data: st.DataObject) -> None:
    """Frames come out one by one; a stream that breaks off inside one ends before it."""
    frames = [encode_frame(Said(text)) for text in texts]
    stream = b"".join(frames)
    cut = data.draw(st.integers(0, len(stream)))
    ends = [sum(map(len, frames[: index + 1])) for index in range(len(frames))]
    whole = texts[: sum(end <= cut for end in ends)]
    assert [decode(payload).text for payload in blocking(stream[:cut])] == whole
    heard = asyncio.run(of_the_event_loop(stream[:cut]))
    assert [decode(payload).text for payload in heard] == whole


def test_a_connection_that_breaks_has_ended() -> None:
    """A reset while a frame is awaited is the end of the stream."""

    async def receive() -> bytes | None:
        reader = asyncio.StreamReader()
        reader.set_exception(ConnectionResetError())
        return await receive_frame(reader)

    assert asyncio.run(receive()) is None


def test_a_frame_carries_its_payload() -> None:
    """What follows the length is the message."""
    assert decode(payload_of(encode_frame(Said("é")))) == Said("é")
