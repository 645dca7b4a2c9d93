"""Log probabilities as clients read them, where tokens share a name."""

from __future__ import annotations

import msgspec
import pytest

from fastserve.core.messages import TokenLogprobs
from fastserve.server.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from fastserve.text.tokenizer import Tokenizer
from tests import tiny_tokenizers

BACKEND = tiny_tokenizers.byte_fallback()
TOKENIZER = Tokenizer(BACKEND, {}, None)
LETTER, BYTE = BACKEND.get_vocab()["a"], BACKEND.get_vocab()["<0x61>"]


@pytest.mark.parametrize("chosen", [LETTER, BYTE])
def test_a_worse_token_of_the_same_name_does_not_hide_the_best(chosen):
    """Evaluations call a token greedy if none of the top ones is above it."""
    scores = {LETTER: -0.5, BYTE: -2.0}
    names = TokenNames(TOKENIZER, as_ids=False)
    assert names.name(LETTER) == names.name(BYTE) == "a"
    entry = TokenLogprobs(scores[chosen], 1, [LETTER], [scores[LETTER]])
    found = completion_logprobs(names, [(chosen, entry)], [0], num_top=1)
    assert found.token_logprobs == [scores[chosen]]
    assert found.top_logprobs == [{"a": -0.5}]


@pytest.mark.parametrize("as_ids", [True, False])
def test_prompt_logprobs_have_the_text_of_their_ids(as_ids):
    """They are keyed by id anyway; return_tokens_as_token_ids is about names."""
    entry = TokenLogprobs(-0.5, 1, [LETTER], [-0.5])
    names = TokenNames(TOKENIZER, as_ids)
    made = prompt_logprobs(names, [BYTE, LETTER], [entry], num_top=1)
    _, ranked = msgspec.json.decode(made)
    assert ranked[str(LETTER)]["decoded_token"] == "a"
