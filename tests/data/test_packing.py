"""Packing documents into rows: what is in the rows, and that it is best-fit decreasing, one document at a time."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax.data import packing
from mla_jax.data.packing import pack
from mla_jax.errors import InputError

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths=LENGTHS)
@settings(max_examples=100)
def test_packing_holds_every_document_once(lengths):
    rows = list(pack(np.array(lengths), 50, "file"))
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    sums = [sum(lengths[document] for document in row) for row in rows]
    assert max(sums) <= 50
    assert len(rows) == 1 or sorted(sums)[0] + sorted(sums)[1] > 50  # no two rows could be one


@given(lengths=LENGTHS, seq_len=st.integers(50, 120))
@settings(max_examples=200)
def test_each_document_goes_where_it_leaves_least_room(lengths, seq_len):
    rooms = []  # one document at a time, the longest first
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms.remove(min(fits))
        rooms.append((min(fits) if fits else seq_len) - length)
    packed = [seq_len - sum(lengths[i] for i in row) for row in pack(np.array(lengths), seq_len, "file")]
    assert sorted(packed) == sorted(rooms)


def test_packing_is_tight_and_leaves_out_what_is_too_long(caplog, monkeypatch):
    lengths = np.array([10, 6, 11, 4, 7, 3])
    with caplog.at_level(logging.WARNING):
        rows = pack(lengths, 10, "chats.jsonl")
        monkeypatch.setattr(packing, "is_main", lambda: False)
        pack(lengths, 10, "chats.jsonl")  # the other processes of a job do not say it again
    assert sorted(sorted(row) for row in rows) == [[0], [1, 3], [4, 5]]
    assert [r.getMessage() for r in caplog.records] == [
        "chats.jsonl: left out 1 of 6 documents that are too long; the longest has 11 tokens and seq_len is 10"
    ]


def test_nothing_that_fits_is_an_error():
    with pytest.raises(InputError, match="none of the 2 documents fits; the longest has 12 tokens and seq_len is 10"):
        pack(np.array([12, 11]), 10, "chats.jsonl")
