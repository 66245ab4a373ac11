"""Streamed text: whole characters, no stop strings, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.inference.text_stream import TextStream

BYTES = load_tokenizer("bytes")


def pieces_of(text, stop=(), size=1):
    stream = TextStream(BYTES, stop)
    ids = BYTES.encode(text)
    pieces = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*pieces, stream.finish()], stream


@given(st.text(alphabet="aé漢😀 b\n", max_size=20), st.integers(1, 5))
def test_pieces_add_up_to_the_text_and_never_split_a_character(text, size):
    pieces, stream = pieces_of(text, size=size)
    assert "".join(pieces) == stream.text == text
    assert "\ufffd" not in "".join(pieces)


@given(st.text(alphabet="ab", max_size=12), st.lists(st.text(alphabet="ab", min_size=1, max_size=3), max_size=2))
def test_nothing_of_a_stop_string_is_given(text, stop):
    pieces, stream = pieces_of(text, stop)
    # Bytes come one at a time, so the stop string that is complete first ends the text.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.find(s) for s in stop if s in seen)]
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == bool(ends)


def test_what_may_become_a_stop_string_waits():
    stream = TextStream(BYTES, ["END"])
    assert stream.add(BYTES.encode("the EN")) == "the "
    assert stream.add(BYTES.encode("TRY")) == "ENTRY"
    assert stream.add(BYTES.encode(" END and more")) == " "
    assert stream.stopped and stream.add(BYTES.encode("more")) == ""


def test_an_unfinished_character_is_given_at_the_end():
    stream = TextStream(BYTES)
    assert stream.add(list("é".encode())[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="must not be empty"):
        TextStream(BYTES, [""])
