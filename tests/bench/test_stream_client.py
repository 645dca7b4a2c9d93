"""The benchmark's client counts an answer only when it is whole."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from fastserve.bench.stream_client import Endpoint, LostRequestError, ask

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


FIELDS = {"prompt": "once upon", "max_tokens": 3, "ignore_eos": True, "stream": True}


def event(text="", finish_reason=None, usage=None):
    """Return one event of a completion stream."""
    choices = [] if usage else [{"index": 0, "text": text, "finish_reason": finish_reason}]
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n".encode()


def chunked(*bodies):
    """Frame bodies as HTTP chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"


def ids_event(ids, reason=None):
    """Return one event of a completion stream that has ids and no text."""
    choice = {"text": "", "token_ids": ids, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


async def answer_with(raw):
    """Ask a socket that answers with `raw` and hangs up; return (request received, answer)."""
    received = b""

    async def serve(reader, writer):
        nonlocal received
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        received = await reader.readexactly(length)
        writer.write(raw)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        address = server.sockets[0].getsockname()[:2]
        answer = await ask(Endpoint(*address), FIELDS)
    return json.loads(received), answer


async def first_tokens(num_wanted, *bodies):
    """Read so many tokens of a socket that has sent `bodies` and waits; return the answer.

    Comes to an end only if the client hangs up by itself.
    """
    gone = asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        gone.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        address = server.sockets[0].getsockname()[:2]
        try:
            return await ask(Endpoint(*address), {"prompt": [1]}, num_wanted=num_wanted)
        finally:
            await gone.wait()


WHOLE = (
    event("a"),
    event("b") + event("c", "length"),
    event(usage={"prompt_tokens": 9, "completion_tokens": 3}),
    b"data: [DONE]\n\n",
)


def test_a_whole_answer_is_timed():
    """Tokens are counted by the server's usage."""
    sent, answer = asyncio.run(answer_with(HEAD + chunked(*WHOLE)))
    assert sent == FIELDS
    assert (answer.prompt_tokens, answer.output_tokens) == (9, 3)
    assert len(answer.piece_times) == 3
    assert [answer.sent_at, *answer.piece_times] == sorted([answer.sent_at, *answer.piece_times])


def test_events_may_be_cut_anywhere():
    """HTTP chunks need not end where events do."""
    body = b"".join(WHOLE)
    raw = HEAD + chunked(*(body[i : i + 7] for i in range(0, len(body), 7)))
    assert asyncio.run(answer_with(raw))[1].output_tokens == 3


def test_events_may_bear_ids():
    """Those of streams that can be resumed do."""
    body = b"".join(WHOLE).replace(b"data: ", b"id: NAME:7\ndata: ")
    assert asyncio.run(answer_with(HEAD + chunked(body)))[1].output_tokens == 3


def test_ids_without_text_are_a_piece():
    """A model without a tokenizer streams ids; an event with neither text nor ids is none."""
    bodies = (ids_event([5]), ids_event([]), ids_event([6, 7], "length"))
    answer = asyncio.run(answer_with(HEAD + chunked(*bodies, *WHOLE[2:])))[1]
    assert len(answer.piece_times) == 2


@pytest.mark.parametrize(("num_wanted", "num_pieces"), [(1, 1), (2, 2), (3, 2), (4, 3)])
def test_a_reader_hangs_up_at_the_last_token_wanted(num_wanted, num_pieces):
    """What came with it, or after it, is neither counted nor timed."""
    bodies = (ids_event([5]), ids_event([6, 7]) + ids_event([8]), ids_event([9]))
    answer = asyncio.run(first_tokens(num_wanted, *bodies))
    assert answer.output_tokens == num_wanted
    assert len(answer.piece_times) == num_pieces


def test_an_answer_that_ends_before_the_last_token_wanted_is_lost():
    """Though the server calls it whole."""
    bodies = (ids_event([5, 6], "length"), b"data: [DONE]\n\n")
    with pytest.raises(LostRequestError, match="2 of 3 tokens, ended by length"):
        asyncio.run(first_tokens(3, *bodies))


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"HTTP/1.1 503 no\r\nconnection: close\r\n\r\nbusy", "503"),
        (HEAD + chunked(event("a")), "without"),
        (HEAD + b"ff\r\ndata: ", "broke off"),
        (HEAD + chunked(b'data: {"error": {"message": "boom"}}\n\n'), "boom"),
        (HEAD + chunked(event("a", "stop"), *WHOLE[2:]), "ended by stop"),
        (HEAD + chunked(event("a", "length"), b"data: [DONE]\n\n"), "0 of 3"),
        (b"", "broke off"),
    ],
)
def test_anything_less_is_lost(raw, complaint):
    """Errors, cut streams, wrong lengths and missing ends all count as lost."""
    with pytest.raises(LostRequestError, match=complaint):
        asyncio.run(answer_with(raw))
