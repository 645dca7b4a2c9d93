"""/tokenize and /detokenize."""

from __future__ import annotations

import pytest

from tests.server.scripted import TOKENIZER, ScriptedEngine, call, make_app, post


def test_a_text_becomes_ids_and_comes_back():
    """With the special tokens unless they are unwanted, and the vocabulary's spelling."""
    body = {"prompt": "the dog €", "return_token_strs": True}
    shown = post(ScriptedEngine(), "/tokenize", body).json()
    assert shown["tokens"] == TOKENIZER.encode("the dog €")
    assert shown["count"] == len(shown["tokens"]) == len(shown["token_strs"])
    assert (shown["max_model_len"], shown["token_strs"][0]) == (100, "<s>")
    back = post(ScriptedEngine(), "/detokenize", {"tokens": shown["tokens"]}).json()
    assert back == {"prompt": "<s>the dog €"}
    bare = post(ScriptedEngine(), "/tokenize", {"prompt": "a", "add_special_tokens": False}).json()
    assert bare["tokens"] == shown["tokens"][:0] + TOKENIZER.encode("a", False)


def test_messages_become_the_ids_of_their_prompt():
    """By the chat template."""
    body = {"messages": [{"role": "user", "content": "hi"}]}
    shown = post(ScriptedEngine(), "/tokenize", body).json()
    assert shown["tokens"] == TOKENIZER.encode("<s><|user|>hi\n<|assistant|>", False)


def test_a_long_text_is_taken():
    """Longer than the window: counting it is what the route is for."""
    assert post(ScriptedEngine(), "/tokenize", {"prompt": "dog " * 5000}).json()["count"] > 5000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": []}),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {}),
    ],
)
def test_what_makes_no_sense_is_a_400(path, body):
    """Neither or both inputs, ids that do not exist."""
    assert post(ScriptedEngine(), path, body).status_code == 400


def test_without_a_tokenizer_both_are_a_400():
    """In words that say why."""
    app = make_app(ScriptedEngine(), tokenizer=None)
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        response = call(app, "POST", path, json=body)
        assert response.status_code == 400
        assert "no tokenizer" in response.json()["error"]["message"]
