"""What the clients of a soak do, drawn at random: ask, hang up, come back, ask for nonsense.

Rules: one seeded generator draws everything; whatever a client does, its outcome is counted under
one name, and what must not happen (a lost answer, a status 5xx, a gap in a stream, a canary that
says something else) under a name of `FAULTS`. Must not know: when requests are sent, the figures.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.resuming_client import Received, exchange, receive, receive_in_pieces
from fastserve.bench.stream_client import Endpoint, LostRequestError, http_request

FAULTS = ("lost", "server_error", "gap", "wrong_canary", "nonsense_taken")
WORDS = ("the", "for", "statement", "list", "of", "a", "number", "class", "in", "dict", "with")
MAX_PROMPT_WORDS = 300
MAX_OUTPUT_TOKENS = 600
MEDIAN_OUTPUT_TOKENS = 40
MAX_CUTS = 3
FEW_BYTES = 12_000  # within these a connection is cut: headers, and some 50 events

NONSENSE: tuple[Mapping[str, Any], ...] = (
    {"prompt": 5},
    {"prompt": "x", "max_tokens": -1},
    {"prompt": [10**6]},
    {"prompt": [1] * 5000},
    {"prompt": "x", "model": "another"},
    {"prompt": "x", "n": 0},
    {"prompt": "x", "n": 10**6},
    {"prompt": "x", "temperature": -1},
    {"prompt": "x", "logit_bias": {"999999": 1}},
    {"prompt": "x", "response_format": {"type": "json_object"}},
    {"prompt": "x", "stop": [""]},
    {"prompt": [[5], "x"]},
)
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1, "seed": 11},
    {"temperature": 0.8, "top_k": 20, "seed": 12},
    {"temperature": 1, "top_p": 0.9, "seed": 13, "presence_penalty": 0.5},
)
CANARIES: tuple[Mapping[str, Any], ...] = tuple(
    {"prompt": f"Canary {i}: the for statement", "max_tokens": 40, "ignore_eos": True, **kind}
    for i, kind in enumerate(KINDS)
)


@dataclass(slots=True)
class Clients:
    """All clients of a soak: `outcomes` counts what became of each."""

    endpoint: Endpoint
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    num_resumed: int = 0
    num_in_flight: int = 0
    faults: list[str] = field(default_factory=list)  # the first few, in words
    canaries: list[list[str]] = field(default_factory=list)  # what each says when it is alone

    async def learn_canaries(self) -> None:
        """Ask each canary alone: what it says then it must always say."""
        for body in CANARIES:
            self.canaries.append(texts(await receive(self.endpoint, {**body, "stream": True})))

    async def one(self) -> None:
        """Be one client, of a kind that is drawn."""
        kinds: dict[Callable[[], Awaitable[str]], int] = {
            self.ask: 40,
            self.ask_whole: 10,
            self.hang_up: 15,
            self.come_back: 15,
            self.ask_nonsense: 10,
            self.ask_canary: 10,
        }
        [kind] = self.rng.choices(list(kinds), list(kinds.values()))
        self.num_in_flight += 1
        try:
            outcome = await kind()
        except (LostRequestError, OSError) as error:
            outcome = "lost"
            self.note(f"{kind.__name__}: {type(error).__name__}: {error}")
        finally:
            self.num_in_flight -= 1
        self.outcomes[outcome] += 1

    def note(self, fault: str) -> None:
        """Keep the first faults."""
        if len(self.faults) < 20:
            self.faults.append(fault)

    def body(self) -> dict[str, Any]:
        """Draw a request: prompts that often begin alike, answers mostly short and some long."""
        rng = self.rng
        num_words = int(rng.paretovariate(1.2) * 8)
        prompt = " ".join(rng.choices(WORDS, k=min(num_words, MAX_PROMPT_WORDS)))
        if rng.random() < 0.3:
            prompt = (
                "Everybody begins with this: the list, the dict and the for statement. " + prompt
            )
        length = int(rng.lognormvariate(0, 1) * MEDIAN_OUTPUT_TOKENS)
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": max(1, min(length, MAX_OUTPUT_TOKENS)),
            "ignore_eos": rng.random() < 0.8,
            "temperature": rng.choice((0, 0, 0.7, 1)),
            "stream": True,
        }
        if rng.random() < 0.1:
            body |= {"n": rng.randint(2, 4)}
        if rng.random() < 0.1:
            body |= {"logprobs": rng.randint(0, 3)}
        if rng.random() < 0.1:
            body |= {"stop": [" the"]}
        return body

    def cut(self) -> int:
        """Draw after how many bytes a connection is cut."""
        return self.rng.randrange(1, FEW_BYTES)

    async def ask(self) -> str:
        """Read a stream to its end."""
        received = await receive(self.endpoint, self.body())
        texts(received)
        return self.judged(numbers_of(received.events), "answered")

    async def ask_whole(self) -> str:
        """Ask for an answer that is not streamed."""
        received = await receive(self.endpoint, {**self.body(), "stream": False})
        require_whole(received)
        return "answered whole"

    async def hang_up(self) -> str:
        """Leave, streamed or not, and never come back."""
        body = {**self.body(), "stream": self.rng.random() < 0.8}
        received = await receive(self.endpoint, body, num_bytes=self.cut())
        if not received.is_whole:
            return "cut and given up"
        require_whole(received)
        return "answered before it was cut"

    async def come_back(self) -> str:
        """Lose the connection, more than once perhaps, and read the stream to its end."""
        cuts = [self.cut() for _ in range(self.rng.randint(1, MAX_CUTS))]
        resumed = await receive_in_pieces(self.endpoint, self.body(), cuts)
        self.num_resumed += resumed.num_resumed
        return self.judged(numbers_of(resumed.events), "cut and resumed")

    async def ask_nonsense(self) -> str:
        """Ask for what must be refused."""
        request = http_request(self.endpoint, self.rng.choice(NONSENSE))
        if self.rng.random() < 0.2:
            request = request[:-1] + b"!"  # no JSON
        received = await exchange(self.endpoint, request)
        if 400 <= received.status < 500 and received.is_whole:
            return "refused"
        self.note(f"{received.status} for {request[-200:]!r}")
        return "server_error" if received.status >= 500 else "nonsense_taken"

    async def ask_canary(self) -> str:
        """Ask what was asked before; half of them lose their connection meanwhile."""
        index = self.rng.randrange(len(CANARIES))
        body = {**CANARIES[index], "stream": True}
        if self.rng.random() < 0.5:
            resumed = await receive_in_pieces(self.endpoint, body, [self.cut()])
            self.num_resumed += resumed.num_resumed
            said = texts_of(resumed.events)
        else:
            said = texts(await receive(self.endpoint, body))
        if said == self.canaries[index]:
            return "canary"
        self.note(f"canary {index}: {said}")
        return "wrong_canary"

    def judged(self, numbers: list[int], outcome: str) -> str:
        """Return the outcome of a stream: a gap where its events are not numbered one by one."""
        if numbers == list(range(1, len(numbers) + 1)):
            return outcome
        self.note(f"events {numbers}")
        return "gap"


def numbers_of(events: bytes) -> list[int]:
    """Return the numbers of events."""
    return [int(number) for number in re.findall(rb"^id: \S+:(\d+)$", events, re.MULTILINE)]


def require_whole(received: Received) -> None:
    """Raise LostRequestError for an answer that is an error, or breaks off."""
    if received.status != 200 or not received.is_whole:
        raise LostRequestError(f"{received.status}: {received.body[-200:]!r}")


def texts(received: Received) -> list[str]:
    """Return the text of each choice; LostRequestError where the stream is not whole."""
    require_whole(received)
    return texts_of(received.events)


def texts_of(events: bytes) -> list[str]:
    """Return the text of each choice; LostRequestError for a stream that does not end well."""
    *pieces, _ = [event.rpartition(b"\n")[2] for event in events.split(b"\n\n")]
    if not pieces or pieces.pop() != b"data: [DONE]":
        raise LostRequestError("the stream ended without [DONE]")
    said: dict[int, str] = {}
    for piece in pieces:
        chunk = json.loads(piece.removeprefix(b"data: "))
        if "error" in chunk:
            raise LostRequestError(str(chunk["error"]))
        for choice in chunk["choices"]:
            said[choice["index"]] = said.get(choice["index"], "") + choice["text"]
    return [said[index] for index in sorted(said)]
