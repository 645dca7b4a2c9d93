"""TextStream: pieces concatenate to the whole; stop strings against a search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.core.messages import Sample
from fastserve.core.request import FinishReason, SamplingParams
from fastserve.text.text_stream import MAX_WINDOW_TOKENS, REPLACEMENT, Detokenizer, TextStream
from fastserve.text.tokenizer import Tokenizer
from tests import tiny_tokenizers

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
BYTE_LEVEL = Tokenizer(tiny_tokenizers.byte_level(), NAMED, None)
FALLBACK = Tokenizer(tiny_tokenizers.byte_fallback(), NAMED, None)
EOS = frozenset({1})

any_ids = st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40)
any_text = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=30)


def stream(tokenizer=BYTE_LEVEL, prompt=(), **params) -> TextStream:
    """Return a stream with these sampling parameters."""
    return TextStream(tokenizer, prompt, SamplingParams(**params), EOS)


def samples_of(ids) -> list[Sample]:
    """Wrap ids."""
    return [Sample(token_id) for token_id in ids]


def pushed(text: TextStream, groups, reason=FinishReason.LENGTH):
    """Push groups of ids until a stop string matches; return the deltas."""
    deltas = []
    for number, group in enumerate(groups, start=1):
        is_last = number == len(groups)
        deltas.append(text.push(samples_of(group), reason if is_last else None))
        if deltas[-1].matched_stop is not None:
            break
    return deltas


@st.composite
def groups_of(draw, ids):
    """Cut drawn ids into updates of one or more."""
    rest, groups = draw(ids), []
    while rest:
        size = draw(st.integers(1, 3))
        groups.append(rest[:size])
        rest = rest[size:]
    return groups or [[]]


@given(groups_of(any_ids), st.booleans())
@settings(max_examples=300)
def test_pieces_concatenate_to_the_whole(groups, skips):
    """For any ids, valid UTF-8 or not, special or not."""
    ids = [token_id for group in groups for token_id in group]
    deltas = pushed(stream(skip_special_tokens=skips), groups)
    assert "".join(delta.text for delta in deltas) == BYTE_LEVEL.decode(ids, skips)
    assert [i for delta in deltas for i in delta.token_ids] == ids
    assert deltas[-1].num_output_tokens == len(ids)


@given(any_text, st.sampled_from([BYTE_LEVEL, FALLBACK]))
def test_no_piece_has_half_a_character(text, tokenizer):
    """Text without replacement characters never shows one on the way."""
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    pieces.append(detokenizer.flush())
    assert REPLACEMENT not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))


@given(any_text, any_text)
def test_an_output_goes_on_where_its_prompt_ended(prompt, text):
    """The space before the first word is there, though decoding the output alone would drop it."""
    head = FALLBACK.encode("the " + prompt, add_special_tokens=False)
    ids = FALLBACK.encode("the dog " + text, add_special_tokens=False)
    deltas = pushed(stream(FALLBACK, prompt=head), [[token_id] for token_id in ids])
    whole = FALLBACK.decode([*head, *ids])
    assert "".join(delta.text for delta in deltas) == whole[len(FALLBACK.decode(head)) :]


@given(any_ids, st.lists(groups_of(any_ids), min_size=2, max_size=3))
def test_twins_know_nothing_of_each_other(prompt, outputs):
    """Outputs of one prompt that grow by turns say what each says alone."""
    options = {"prompt": prompt, "stop": ("ab", "t")}
    first = stream(**options)
    twins = [first, *(first.twin() for _ in outputs[1:])]
    alone = [stream(**options) for _ in outputs]
    for turn in range(max(map(len, outputs))):
        for groups, twin, one in zip(outputs, twins, alone, strict=True):
            if turn < len(groups):
                reason = FinishReason.LENGTH if turn == len(groups) - 1 else None
                told = samples_of(groups[turn])
                assert twin.push(told, reason) == one.push(told, reason)


def naive_stop(ids, stops, min_tokens, include):
    """Search the whole text after each token: the first match that ends in new text."""
    before = ""
    for count in range(1, len(ids) + 1):
        after = BYTE_LEVEL.decode(ids[:count])
        if count < len(ids):
            after = after.rstrip(REPLACEMENT)
        found = []
        for stop in stops:
            at = after.find(stop)
            while at >= 0 and at + len(stop) <= len(before):
                at = after.find(stop, at + 1)
            if at >= 0:
                found.append((at, stops.index(stop), stop))
        if found and count >= min_tokens:
            at, _, stop = min(found)
            return after[: at + len(stop)] if include else after[:at], stop, count
        before = after
    return BYTE_LEVEL.decode(ids), None, len(ids)


stop_text = st.text("abt€ é", min_size=1, max_size=4)


@given(
    st.text("abt€ é", max_size=25),
    st.lists(stop_text, min_size=1, max_size=3, unique=True),
    st.integers(0, 6),
    st.booleans(),
    st.data(),
)
@settings(max_examples=400)
def test_stop_strings_against_a_naive_search(text, stops, min_tokens, include, data):
    """Text, stop string and token count are those of a search in the whole text."""
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    groups = data.draw(groups_of(st.just(ids)))
    text_stream = stream(
        stop=stops, min_tokens=min_tokens, max_tokens=None, include_stop_str_in_output=include
    )
    deltas = pushed(text_stream, groups)
    expected, stop, count = naive_stop(ids, stops, min_tokens, include)
    assert "".join(delta.text for delta in deltas) == expected
    assert deltas[-1].matched_stop == stop
    assert deltas[-1].num_output_tokens == count
    if stop is None:
        assert deltas[-1].finish_reason is FinishReason.LENGTH


def test_text_that_may_become_a_stop_string_is_held_back():
    """And given as soon as it cannot."""
    ids = BYTE_LEVEL.encode("xENx", add_special_tokens=False)
    text = stream(stop="END")
    assert [text.push([Sample(i)]).text for i in ids] == ["x", "", "", "ENx"]


def test_what_is_held_back_comes_with_the_end():
    """A beginning of a stop string is ordinary text when nothing follows."""
    ids = BYTE_LEVEL.encode("xEN", add_special_tokens=False)
    text = stream(stop="END")
    assert "".join(text.push([Sample(i)]).text for i in ids) == "x"
    assert text.push([], FinishReason.LENGTH).text == "EN"


def test_nothing_follows_a_match():
    """Samples that were under way are dropped; the terminal update says stop."""
    ids = BYTE_LEVEL.encode("aENDbc", add_special_tokens=False)
    text = stream(stop="END")
    first = text.push(samples_of(ids[:5]))
    assert (first.text, first.matched_stop, first.num_output_tokens) == ("a", "END", 4)
    assert first.finish_reason is None
    last = text.push(samples_of(ids[5:]), FinishReason.LENGTH)
    assert (last.text, last.samples, last.matched_stop) == ("", (), None)
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "END")


@pytest.mark.parametrize(("include", "expected"), [(False, "a"), (True, "a</s>")])
def test_the_ending_token_has_no_text_unless_asked_for(include, expected):
    """It counts as a token all the same."""
    ids = [*BYTE_LEVEL.encode("a", add_special_tokens=False), 1]
    text = stream(include_stop_str_in_output=include, skip_special_tokens=False)
    delta = text.push(samples_of(ids), FinishReason.STOP)
    assert (delta.text, delta.num_output_tokens, delta.stop_reason) == (expected, 2, None)


def test_a_stop_token_is_dropped_and_named():
    """stop_token_ids name ordinary tokens too."""
    a, b = BYTE_LEVEL.encode("ab", add_special_tokens=False)
    delta = stream(stop_token_ids=[b]).push(samples_of([a, b]), FinishReason.STOP, b)
    assert (delta.text, delta.stop_reason) == ("a", b)


def test_offsets_say_where_tokens_begin():
    """Tokens that make one character together begin at the same place or after it."""
    ids = BYTE_LEVEL.encode("a😀b", add_special_tokens=False)
    delta = stream().push(samples_of(ids), FinishReason.LENGTH)
    assert delta.offsets[:2] == (0, 1)
    assert delta.offsets[-1] == 2
    assert delta.text == "a😀b"


def test_garbage_is_shown_in_bounded_time():
    """Bytes that never make a character do not pile up."""
    [first, *_] = BYTE_LEVEL.encode("😀", add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL)
    pieces = [detokenizer.push(first) for _ in range(4 * MAX_WINDOW_TOKENS)]
    assert any(pieces)
    assert len("".join(pieces) + detokenizer.flush()) >= 3 * MAX_WINDOW_TOKENS


def test_without_a_tokenizer_there_are_ids_and_no_text():
    """Stop strings cannot be honoured then."""
    delta = stream(None).push(samples_of([5, 6]), FinishReason.LENGTH)
    assert (delta.text, delta.token_ids) == ("", [5, 6])
    with pytest.raises(ValueError, match="stop strings"):
        stream(None, stop="x")
