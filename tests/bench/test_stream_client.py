"""The benchmark's client counts an answer only when it is whole."""

from __future__ import annotations

import asyncio
import json

import pytest

from fastserve.bench.stream_client import Endpoint, LostRequestError, ask, fields_of

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(text="", finish_reason=None, usage=None):
    """Return one event of a completion stream."""
    choices = [] if usage else [{"index": 0, "text": text, "finish_reason": finish_reason}]
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n".encode()


def chunked(*bodies):
    """Frame bodies as HTTP chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"


async def answer_with(raw, num_output_tokens=3):
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
        answer = await ask(Endpoint(*address), fields_of("once upon", num_output_tokens))
    return json.loads(received), answer


WHOLE = (
    event("a"),
    event("b") + event("c", "length"),
    event(usage={"prompt_tokens": 9, "completion_tokens": 3}),
    b"data: [DONE]\n\n",
)


def test_a_whole_answer_is_timed():
    """Tokens are counted by the server's usage, and exact lengths are asked for."""
    sent, answer = asyncio.run(answer_with(HEAD + chunked(*WHOLE)))
    assert sent["max_tokens"] == 3
    assert sent["ignore_eos"] is True
    assert (answer.prompt_tokens, answer.output_tokens) == (9, 3)
    assert len(answer.piece_times) == 3
    assert [answer.sent_at, *answer.piece_times] == sorted([answer.sent_at, *answer.piece_times])


def test_events_may_be_cut_anywhere():
    """HTTP chunks need not end where events do."""
    body = b"".join(WHOLE)
    raw = HEAD + chunked(*(body[i : i + 7] for i in range(0, len(body), 7)))
    assert asyncio.run(answer_with(raw))[1].output_tokens == 3


def test_ids_without_text_are_a_piece():
    """A model without a tokenizer streams ids; an event with neither text nor ids is none."""
    events = [
        {"choices": [{"text": "", "token_ids": ids, "finish_reason": reason}]}
        for ids, reason in (([5], None), ([], None), ([6, 7], "length"))
    ]
    bodies = (f"data: {json.dumps(each)}\n\n".encode() for each in events)
    answer = asyncio.run(answer_with(HEAD + chunked(*bodies, *WHOLE[2:])))[1]
    assert len(answer.piece_times) == 2


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
