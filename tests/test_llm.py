"""LLM: vLLM's calls and results, in process, on the bundled model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch

from fastserve import LLM, SamplingParams
from fastserve.core.request import Arrival
from fastserve.core.request import SamplingParams as CoreParams
from fastserve.llm import RequestOutput
from fastserve.settings.option import ConfigError
from tests.failing_step import REASON, fail_once
from tests.fresh_cache import make_fresh_cache

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Load the bundled model once, with a small pool and a fresh cache directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", make_fresh_cache(tmp_path_factory.mktemp("cache")))
        with LLM("demo", num_device_blocks=64, num_threads=1) as loaded:
            yield loaded


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    """After every test nothing runs and nothing is held."""
    yield
    llm._engine.scheduler.check()
    assert llm._engine.num_requests == 0
    assert llm._live == {}
    while not llm._engine.is_idle:
        llm._engine.step()
    assert llm._engine.stats().scheduler.device_blocks_used == 0


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    """Return the ids of the first answers."""
    return [output.outputs[0].token_ids for output in outputs]


def test_prompts_come_in_every_form(llm: LLM) -> None:
    """Text, ids and mappings, alone and in lists, are the same prompts."""
    text = "def main():"
    tokens = llm.get_tokenizer().encode(text)
    forms: list[object] = [
        text, tokens, tuple(tokens), {"prompt": text}, {"prompt_token_ids": tokens},
        [text], [tokens], [{"prompt_token_ids": tokens}],
    ]  # fmt: skip
    results = [llm.generate(form, GREEDY, use_tqdm=False) for form in forms]  # type: ignore[arg-type]
    assert all(len(outputs) == 1 for outputs in results)
    assert all(ids(outputs) == ids(results[0]) for outputs in results)
    assert results[0][0].prompt == text
    assert results[1][0].prompt is None
    assert results[1][0].prompt_token_ids == tokens


def test_a_batch_keeps_its_order_and_its_params(llm: LLM) -> None:
    """Outputs are in the order of the prompts, each with its own parameters."""
    prompts = ["one", "two words", "a third"]
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (9, 2, 5)]
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in together] == prompts
    assert [len(tokens) for tokens in ids(together)] == [9, 2, 5]
    alone = [llm.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
    assert ids(together) == ids(alone)
    assert len({output.request_id for output in together + alone}) == 6


def test_an_output_has_what_vllm_has(llm: LLM) -> None:
    """Text is that of the ids; reasons, times and flags are filled in."""
    (output,) = llm.generate("import os", GREEDY, use_tqdm=False)
    (answer,) = output.outputs
    assert output.finished
    assert answer.index == 0
    assert answer.text == llm.get_tokenizer().decode(answer.token_ids, skip_special_tokens=True)
    assert answer.finish_reason == "length"
    assert answer.stop_reason is None
    assert answer.logprobs is None
    assert answer.cumulative_logprob is None
    assert output.prompt_logprobs is None
    metrics = output.metrics
    assert metrics is not None
    assert metrics.first_token is not None
    assert metrics.arrival <= metrics.first_token <= metrics.finished


def test_several_answers_are_told_apart_by_their_seeds(llm: LLM) -> None:
    """Choice i of seed s is the single answer with seed s + i; a seed repeats itself."""
    params = SamplingParams(n=3, temperature=1.0, top_k=20, seed=11, max_tokens=8, ignore_eos=True)
    (output,) = llm.generate("print", params, use_tqdm=False)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    singles = [
        llm.generate("print", dataclasses.replace(params, n=1, seed=11 + i), use_tqdm=False)
        for i in range(3)
    ]
    assert [answer.token_ids for answer in output.outputs] == [ids(single)[0] for single in singles]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3


def test_logprobs_are_tables_by_id(llm: LLM) -> None:
    """Chosen ids and alternatives are scored, and the prompt from its second id on."""
    params = dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=1, max_tokens=3)
    (output,) = llm.generate("class Point:", params, use_tqdm=False)
    (answer,) = output.outputs
    assert answer.logprobs is not None
    for token_id, table in zip(answer.token_ids, answer.logprobs, strict=True):
        assert table[token_id].rank == 1
        assert len(table) == 2
        assert table[token_id].decoded_token is not None
    chosen = [table[i].logprob for i, table in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(chosen))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token_id, entry in zip(
        output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert entry is not None
        assert entry[token_id].logprob < 0.0


def test_a_stop_string_ends_an_answer(llm: LLM) -> None:
    """The text ends before the stop string, and the reason names it."""
    (whole,) = llm.generate("x = ", dataclasses.replace(GREEDY, max_tokens=30), use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (cut,) = llm.generate(
        "x = ", dataclasses.replace(GREEDY, max_tokens=30, stop=stop), use_tqdm=False
    )
    answer = cut.outputs[0]
    assert answer.text == text[: text.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.stop_reason == stop
    assert len(answer.token_ids) < 30


def test_a_stop_token_ends_an_answer(llm: LLM) -> None:
    """The id is in the ids and its text is not in the text."""
    (whole,) = llm.generate("x = ", GREEDY, use_tqdm=False)
    tokens = whole.outputs[0].token_ids
    stop = tokens[4]
    params = dataclasses.replace(GREEDY, stop_token_ids=[stop])
    answer = llm.generate("x = ", params, use_tqdm=False)[0].outputs[0]
    assert answer.token_ids == tokens[: tokens.index(stop) + 1]
    assert answer.text == llm.get_tokenizer().decode(answer.token_ids[:-1], True)
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_a_conversation_is_the_templates_prompt(llm: LLM) -> None:
    """`chat` encodes with the model's template; a list of conversations is a batch."""
    messages = [{"role": "user", "content": "Hello"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert output.prompt_token_ids == expected["input_ids"]
    both = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert ids(both) == ids([output, output])


def test_a_stream_is_the_whole_text_in_pieces(llm: LLM) -> None:
    """Pieces of several streams in turn join to what `generate` and `chat` say."""
    messages = [{"role": "user", "content": "Hello"}]
    streams = [llm.stream("import sys", GREEDY), llm.stream(messages, GREEDY)]
    texts = ["".join(pieces) for pieces in zip(*zip_longest(*streams, fillvalue=""), strict=True)]
    assert texts[0] == llm.generate("import sys", GREEDY, use_tqdm=False)[0].outputs[0].text
    assert texts[1] == llm.chat(messages, GREEDY, use_tqdm=False)[0].outputs[0].text


def test_a_stream_that_is_left_ends_its_request(llm: LLM) -> None:
    """Closing the generator aborts; the fixture sees that nothing stays behind."""
    stream = llm.stream("import sys", dataclasses.replace(GREEDY, max_tokens=500))
    assert next(stream)
    assert llm._engine.num_requests == 1
    stream.close()  # type: ignore[attr-defined]
    assert llm._engine.num_requests == 0


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[5, 6], [5] * 5000], {}, "maximum context length|KV cache"),
        ([[]], {}, "empty"),
        ({"prompt_token_ids": [99_999]}, {}, "99999 .* out of vocabulary"),
        (["fine", [5, 99_999], "fine"], {}, "99999 .* out of vocabulary"),
        ([[5, -1]], {}, "-1 .* out of vocabulary"),
        ("a", {"logit_bias": {99_999: 1.0}}, "99999 in logit_bias"),
        ("a", {"stop_token_ids": [99_999], "min_tokens": 2}, "99999 in stop_token_ids"),
        ("a", {"stop_token_ids": range(-1, 5)}, "-1 in stop_token_ids"),
        ("a", {"min_tokens": 1, "stop_token_ids": range(100_000)}, "stop_token_ids"),
        ("a", {"min_tokens": 12, "max_tokens": 12, "stop_token_ids": "every"}, "min_tokens"),
        ("a", {"logprobs": 21}, "logprobs"),
        ("a", {"prompt_logprobs": 21}, "prompt_logprobs"),
        ("a", {"n": 100_000}, "choices"),
        ("a", {"stop": ["x"] * 65}, "stop must have at most"),
        ("a", {"min_tokens": 4000, "max_tokens": 5000}, "min_tokens is 4000"),
        ({"text": "a"}, {}, "prompt_token_ids"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, {}, "multi_modal_data"),
        ({"prompt": "a", "cache_salt": ""}, {}, "cache_salt"),
        ({"prompt": "a", "cache_salt": "b" * 1025}, {}, "cache_salt"),
        ({"prompt_token_ids": [5], "mood": "bad"}, {}, "mood"),
        ([["a", 5]], {}, "integers"),
        ([5, "a"], {}, "position 1 holds 'a'"),
        (np.array([1.5, 2.0]), {}, "integers"),
        ([[True]], {}, "integers"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    llm: LLM, prompts: Any, changes: dict[str, Any], message: str
) -> None:
    """A ValueError, also for one prompt of many; none of the call runs, and the next one does."""
    if changes.get("stop_token_ids") == "every":
        changes = changes | {"stop_token_ids": range(llm.info.vocab_size)}
    params = dataclasses.replace(GREEDY, **changes)
    num_steps = llm._engine.stats().scheduler.num_steps
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm._engine.stats().scheduler.num_steps == num_steps
    assert len(ids(llm.generate("a", GREEDY, use_tqdm=False))[0]) == 12


def test_calls_that_make_no_sense_are_refused(llm: LLM) -> None:
    """By count, by type, by what a stream is; no prompts are no answers."""
    with pytest.raises(ValueError, match="do not match"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(ValueError, match="do not match"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False, priority=[1])
    with pytest.raises(ValueError, match="priority"):
        llm.generate("a", GREEDY, use_tqdm=False, priority=[10**30])
    with pytest.raises(ValueError, match="n must be 1"):
        next(llm.stream("a", dataclasses.replace(GREEDY, n=2)))
    with pytest.raises(TypeError, match="dict"):
        llm.generate("a", {"temperature": 0.0}, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="NoneType"):
        llm.generate(None, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora_request"):
        llm.generate("a", GREEDY, use_tqdm=False, lora_request="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora_request"):
        llm.chat([{"role": "user", "content": "a"}], lora_request="x")  # type: ignore[arg-type]
    assert llm.generate([], GREEDY, use_tqdm=False) == []
    assert llm.generate("a", GREEDY, use_tqdm=False, lora_request=None)


def test_arrays_of_ids_are_prompts(llm: LLM) -> None:
    """Numpy's and torch's, bare, in a mapping, in a list; two dimensions are several prompts."""
    plain = ids(llm.generate([5, 6, 7], GREEDY, use_tqdm=False))
    array = np.array([5, 6, 7])
    for form in (
        array, torch.tensor([5, 6, 7]), {"prompt_token_ids": array}, [array], list(array),
        array.astype(np.uint16), np.array([[5, 6, 7]]), iter([[5, 6, 7]]),
    ):  # fmt: skip
        assert ids(llm.generate(form, GREEDY, use_tqdm=False)) == plain  # type: ignore[arg-type]


def test_max_tokens_is_cut_to_the_room_there_is(llm: LLM) -> None:
    """Fixed large values are what agents send: all that fits is generated, also in a batch."""
    room = llm.info.max_request_tokens
    prompts = [[5] * (room - 3), [5, 6]]
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (4096, 2)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(tokens) for tokens in ids(outputs)] == [3, 2]
    assert outputs[0].outputs[0].finish_reason == "length"


def test_the_cached_part_of_a_prompt_is_counted(llm: LLM) -> None:
    """The second time all whole blocks but the last token's are there already."""
    prompt = [9] * 40
    llm.generate(prompt, GREEDY, use_tqdm=False)
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert output.num_cached_tokens == 32


def test_prompts_of_different_salts_share_nothing(llm: LLM) -> None:
    """Each finds what a prompt of its own salt left, and the answer is the same."""
    salted = [{"prompt_token_ids": [8] * 40, "cache_salt": salt} for salt in ("a", "b", None)]
    counts, answers = [], []
    for prompt in [*salted, *salted]:
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        counts.append(output.num_cached_tokens)
        answers.append(output.outputs[0].token_ids)
    assert counts == [0, 0, 0, 32, 32, 32]
    assert all(answer == answers[0] for answer in answers)
    with pytest.raises(TypeError, match="cache_salt"):
        llm.generate({"prompt": "a", "cache_salt": 5}, GREEDY, use_tqdm=False)


def test_default_params_can_be_changed_and_used(llm: LLM) -> None:
    """As vLLM's; a bad value that was assigned is named when it is used."""
    params = llm.get_default_sampling_params()
    params.max_tokens = 3
    params.stop = None
    assert len(ids(llm.generate("a", params, use_tqdm=False))[0]) <= 3
    params.max_tokens = "many"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="max_tokens must be an integer, got 'many'"):
        llm.generate("a", params, use_tqdm=False)


def test_a_step_that_fails_costs_its_requests_and_nothing_else(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They end with an error, which is logged; the LLM goes on with the very same tokens."""
    prompts = [f"number {i}" for i in range(3)]
    undisturbed = ids(llm.generate(prompts, GREEDY, use_tqdm=False))
    fail_once(llm._engine, monkeypatch)
    lost = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in lost] == ["error"] * 3
    assert REASON in caplog.text
    llm._engine.scheduler.check()
    assert llm._engine.stats().scheduler.device_blocks_used == 0
    assert ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == undisturbed


def test_a_stream_whose_step_fails_raises(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why, and the next one comes out whole."""
    whole = "".join(llm.stream("import os", GREEDY))
    fail_once(llm._engine, monkeypatch)
    with pytest.raises(RuntimeError, match=f"FloatingPointError: {REASON}"):
        list(llm.stream("import os", GREEDY))
    assert "".join(llm.stream("import os", GREEDY)) == whole


def test_a_prompt_that_fills_the_window_is_scored(llm: LLM) -> None:
    """The engine computes all of it in a pool of just its size, and draws the token behind it."""
    size = llm.info.max_request_tokens
    params = CoreParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    handle = llm._engine.add(Arrival([5 + i % 50 for i in range(size)], params))
    num_scores, reason = 0, None
    while reason is None:
        for update in llm._engine.step():
            assert update.handle == handle
            num_scores += len(update.prompt_logprobs)
            reason = update.finish_reason
    assert (num_scores, reason) == (size - 1, "length")


def test_default_sampling_is_the_models(llm: LLM) -> None:
    """Without parameters those of generation_config.json hold."""
    defaults = llm.get_default_sampling_params()
    assert defaults == SamplingParams(**llm.info.sampling_defaults)
    assert len(llm.generate("a", use_tqdm=False)[0].outputs[0].token_ids) <= 16


def test_an_unknown_flag_is_refused() -> None:
    """Flags are those of the configuration and no others."""
    with pytest.raises(ConfigError, match="no_such_flag"):
        LLM("demo", no_such_flag=1)


def test_several_replicas_are_refused() -> None:
    """An LLM is one engine; the line says what runs several."""
    with pytest.raises(ConfigError, match=r"LLM runs one engine.*fastserve serve runs several$"):
        LLM("demo", data_parallel_size=2)
