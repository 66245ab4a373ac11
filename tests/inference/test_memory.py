"""Plans of memory: exact where they can be, monotonous, and turned into the longest context that fits."""

import dataclasses
import functools

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.inference.memory import ALIGNMENT, MemoryPlan, bucketed_capacity, most_that_fits
from mla_jax.model import decoder
from mla_jax.model.transformer import init_params
from tiny import MODEL, empty_cache

plan = functools.partial(MemoryPlan.of, rows=1, tokens=256, cache_dtype=None, int8_weights=False, prefill_chunk=128)
MODELS = [MODEL, dataclasses.replace(MODEL, q_lora_rank=12, tie_word_embeddings=False, dtype="bfloat16")]


def bytes_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("model", MODELS, ids=["float32", "bfloat16, q_lora, untied"])
@pytest.mark.parametrize("int8", [False, True])
def test_weights_and_cache_take_what_is_planned(model, int8):
    planned = plan(model, rows=3, int8_weights=int8, cache_dtype="int8" if int8 else None)
    assert planned.weights == bytes_of(decoder.inference_weights(model, init_params(model, 0), int8))
    assert planned.cache == bytes_of(empty_cache(model, 3, 256, "int8" if int8 else None).layers)
    assert planned.total == planned.weights + planned.cache + planned.workspace


def test_the_workspace_does_not_grow_with_the_context_but_with_the_chunk():
    assert plan(MODEL).workspace == plan(MODEL, tokens=2**20).workspace
    assert plan(MODEL, prefill_chunk=2**15, tokens=2**20).workspace > plan(MODEL, tokens=2**20).workspace
    assert plan(MODEL, rows=64).workspace > plan(MODEL).workspace


@given(
    limit=st.integers(0, 10**6), slope=st.integers(1, 999), offset=st.integers(0, 10**5), step=st.sampled_from([1, 64])
)
def test_the_most_that_fits_fits_and_one_more_does_not(limit, slope, offset, step):
    most = most_that_fits(lambda n: offset + slope * n, limit, step)
    assert most % step == 0
    assert most == 0 or offset + slope * most <= limit
    assert offset + slope * (most + step) > limit


@given(st.integers(1, 2**21))
def test_rooms_are_few_and_hardly_larger_than_needed(tokens):
    room = bucketed_capacity(tokens)
    assert tokens <= room < tokens + max(ALIGNMENT, tokens / 16 + 1)
    assert room % ALIGNMENT == 0
    assert bucketed_capacity(room) == room


def test_there_are_few_rooms():
    assert len({bucketed_capacity(n) for n in range(2**14, 2**15)}) <= 17
