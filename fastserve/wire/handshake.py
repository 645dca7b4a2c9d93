"""How a rank of another host joins: what both ends say, without the socket.

Rules: each end proves that it knows the cluster secret, over what both drew for this
connection, in its own role, so that no proof serves twice or backwards. Until then a peer is read
exactly PROLOGUE_BYTES and PROOF_BYTES, whatever it sends; afterwards a message is bounded. What has
to be equal at both ends (`terms`) is compared by name and value, and a refusal names what differs.
Must not know: sockets, time, what the terms mean.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import msgspec

from fastserve.wire.cluster_secret import PROOF_BYTES, ClusterSecret
from fastserve.wire.frames import LENGTH, encode_frame
from fastserve.wire.links import Exchange

MAGIC = b"fastserve join 1"  # the number is that of this exchange
PROLOGUE_BYTES = len(MAGIC) + 32  # and what was drawn
NO_PROOF = bytes(PROOF_BYTES)  # instead of one, to a peer whose secret differs
MAX_MESSAGE_BYTES = 2**16
MAX_NAMED = 3  # differences that one line can hold
MAX_SHOWN = 80  # characters of a value in it


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """A rank asks to join. Every field has a default: one of another version is heard out."""

    rank: int = -1
    host: str = ""
    local_rank: int = 0  # which of its host's devices it takes
    model_dir: str = ""  # where its host has the model
    meeting_port: int = 0  # of its host, free: where the ranks meet if this is the first
    terms: dict[str, str] = {}


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """All ranks are there; what follows on this connection is theirs."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The rank cannot join; one line says why."""

    reason: str


class HandshakeError(Exception):
    """The other end cannot be joined with; one line says why."""


class RefusedError(HandshakeError):
    """The other end knows the secret and said no."""


_hello_decoder: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
_answer_decoder: msgspec.msgpack.Decoder[Welcome | Refused] = msgspec.msgpack.Decoder(
    Welcome | Refused
)


def hear(secret: ClusterSecret) -> Exchange[Hello]:
    """Be the end that is joined, up to the Hello; the answer to it is the caller's."""
    ours = _draw()
    yield ours
    drawn = ours + _checked((yield PROLOGUE_BYTES))
    if not secret.is_proved((yield PROOF_BYTES), b"rank", drawn):
        yield NO_PROOF
        raise HandshakeError("its cluster secret differs")
    yield secret.prove(b"engine", drawn)
    try:
        return _hello_decoder.decode((yield from _message()))
    except msgspec.MsgspecError as error:
        raise HandshakeError(f"it said what is no hello: {error}") from error


def introduce(secret: ClusterSecret, hello: Hello) -> Exchange[None]:
    """Be the end that joins, up to its Hello."""
    theirs = _checked((yield PROLOGUE_BYTES))
    ours = _draw()
    drawn = theirs + ours
    yield ours + secret.prove(b"rank", drawn)
    proof = yield PROOF_BYTES
    if proof == NO_PROOF or not secret.is_proved(proof, b"engine", drawn):
        raise HandshakeError("its cluster secret differs")
    yield encode_frame(hello)


def await_answer() -> Exchange[None]:
    """Be the end that joins, until it is welcome. Raises RefusedError where it is not."""
    try:
        answer = _answer_decoder.decode((yield from _message()))
    except msgspec.MsgspecError as error:
        raise HandshakeError(f"it said what is no answer: {error}") from error
    if isinstance(answer, Refused):
        raise RefusedError(answer.reason)


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Return in one line what differs, in the order of our terms; "" where nothing does."""
    names = [name for name in (*ours, *theirs) if theirs.get(name) != ours.get(name)]
    lines = [
        f"{name} is {_shown(theirs.get(name))} there, {_shown(ours.get(name))} here"
        for name in dict.fromkeys(names)
    ]
    rest = len(lines) - MAX_NAMED
    return "; ".join(lines[:MAX_NAMED]) + (f"; and {rest} more" if rest > 0 else "")


def _draw() -> bytes:
    return MAGIC + secrets.token_bytes(PROLOGUE_BYTES - len(MAGIC))


def _checked(prologue: bytes) -> bytes:
    if not prologue.startswith(MAGIC):
        raise HandshakeError("it speaks another protocol")
    return prologue


def _message() -> Exchange[bytes]:
    (size,) = LENGTH.unpack((yield LENGTH.size))
    if size > MAX_MESSAGE_BYTES:
        raise HandshakeError(f"a message of {size} bytes; {MAX_MESSAGE_BYTES} at most")
    return (yield size)


def _shown(value: str | None) -> str:
    if value is None:
        return "not given"
    return ascii(value)[1:-1][:MAX_SHOWN] or "empty"
