"""lm-eval's log-likelihoods over HTTP are those of its own Hugging Face backend.

Both score the same requests of the same tiny checkpoint in float32; no data set is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from tests import tiny_tokenizers
from tests.checkpoints import make_checkpoint
from tests.server.conftest import API_KEY, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # lm-eval's own
]

TOLERANCE = 1e-3  # of a log-likelihood, summed over a continuation
WINDOW = 128
TOKENIZERS = {
    "adds-bos": (tiny_tokenizers.byte_level, {}),
    "adds-none": (tiny_tokenizers.chatml, {"bos_token": None, "eos_token": "<|endoftext|>"}),
}
# lm-eval puts the BOS into a text too, and the server one before it: where there is one, ids alone.
CASES = [
    ("adds-bos", {"tokenized_requests": True, "add_bos_token": True}),
    ("adds-bos", {"tokenized_requests": True, "add_bos_token": True, "batch_size": 4}),
    ("adds-none", {"tokenized_requests": True, "num_concurrent": 4, "batch_size": 2}),
    ("adds-none", {"tokenized_requests": False}),
    ("adds-none", {"tokenized_requests": False, "num_concurrent": 4, "batch_size": 2}),
]
PAIRS = [
    ("The quick brown", " fox jumps over the lazy dog"),
    ("The quick brown ", "fox"),
    ("", "an empty context"),
    ("x", "y"),
    ("Price: €5 and 日本", "語のテキスト 😀, naïve"),
    ("<|im_start|>user\nhello<|im_end|>\n", "<|im_start|>assistant\nhi"),
    ("It jumps again. " * 20, "The context is longer than the window."),
]
DOCUMENTS = [
    "It jumps.",
    "Größe and €5. " * 4,
    "A document of several windows, which lm-eval scores one after the other. " * 6,
]


class Served(NamedTuple):
    """A checkpoint behind a server, and what lm-eval's own backend says of it."""

    path: Path
    url: str
    pairs: list[tuple[str, str]]
    log_likelihoods: list[tuple[float, bool]]  # of the pairs; whether greedy
    rolling: list[float]  # of DOCUMENTS


@pytest.fixture(scope="module")
def lm_eval() -> SimpleNamespace:
    """The parts of lm-eval that are used."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: `make test-all` does it")
    return SimpleNamespace(
        Instance=importlib.import_module("lm_eval.api.instance").Instance,
        HFLM=importlib.import_module("lm_eval.models.huggingface").HFLM,
        API=importlib.import_module("lm_eval.models.openai_completions").LocalCompletionsAPI,
    )


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    lm_eval: SimpleNamespace,
) -> Iterator[Served]:
    """A tiny Llama with the named tokenizer, and a server process of its own."""
    make, named = TOKENIZERS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    backend = make()
    size = backend.get_vocab_size()
    make_checkpoint(path, "llama", vocab_size=size, max_position_embeddings=WINDOW)
    tiny_tokenizers.save(backend, path, **named)
    # The API leaves one place for the token that has to be generated and, unlike the oracle,
    # counts the last token that is scored.
    oracle = lm_eval.HFLM(
        pretrained=str(path), device="cpu", dtype="float32", batch_size=1, max_length=WINDOW - 2
    )
    pairs = [*PAIRS, *greedy_pairs(path)]
    with serving("--dtype", "float32", model=str(path)) as (_, url):
        yield Served(
            path,
            url,
            pairs,
            oracle.loglikelihood(requests_of(lm_eval, "loglikelihood", pairs)),
            oracle.loglikelihood_rolling(
                requests_of(lm_eval, "loglikelihood_rolling", [(text,) for text in DOCUMENTS])
            ),
        )


def requests_of(
    lm_eval: SimpleNamespace, kind: str, arguments: Sequence[tuple[str, ...]]
) -> list[Any]:
    """Return lm-eval's requests, as a task would make them."""
    return [lm_eval.Instance(kind, {}, own, index) for index, own in enumerate(arguments)]


def greedy_pairs(path: Path) -> list[tuple[str, str]]:
    """Return contexts with the model's own next token, where it is a text by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    pairs = []
    for number in range(60):
        context = f"Document {number}: the dog"
        ids = tokenizer(context, add_special_tokens=False).input_ids
        with torch.inference_mode():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        text = tokenizer.decode([best])
        if tokenizer(context + text, add_special_tokens=False).input_ids == [*ids, best]:
            pairs.append((context, text))
    return pairs


@pytest.mark.parametrize(("served", "settings"), CASES, indirect=["served"])
def test_log_likelihoods_are_those_of_hugging_face(lm_eval, served, settings, record_property):
    """Of continuations and of whole documents, and whether a continuation is the greedy one."""
    client = lm_eval.API(
        base_url=f"{served.url}/v1/completions", model=str(served.path), max_length=WINDOW,
        tokenizer_backend="huggingface", header={"Authorization": f"Bearer {API_KEY}"},
        max_retries=1, **settings,
    )  # fmt: skip
    found = client.loglikelihood(requests_of(lm_eval, "loglikelihood", served.pairs))
    greedy = [is_greedy for _, is_greedy in served.log_likelihoods]
    assert [is_greedy for _, is_greedy in found] == greedy
    assert set(greedy) == {True, False}
    documents = [(text,) for text in DOCUMENTS]
    rolling = client.loglikelihood_rolling(requests_of(lm_eval, "loglikelihood_rolling", documents))
    differences = [
        *(abs(a - b) for (a, _), (b, _) in zip(found, served.log_likelihoods, strict=True)),
        *(abs(a - b) for a, b in zip(rolling, served.rolling, strict=True)),
    ]
    record_property("largest_difference", max(differences))
    assert max(differences) <= TOLERANCE
