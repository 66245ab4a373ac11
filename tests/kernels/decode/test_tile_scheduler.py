"""Every tile of every sequence belongs to one CTA, and the combine kernel finds its partial result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latent_attention.decode.tile_scheduler import schedule

TILE = 64
jitted = jax.jit(schedule, static_argnums=(1, 2, 3, 4))


def walk(work):
    """Walks the schedule as the kernel does: (CTA, sequence, first tile, one past last, length, kv_len) of splits."""
    ctas_P7, sequences_B4, _ = (np.asarray(x).tolist() for x in work)
    for p, (first, last, begin, end, length, kv_len, run_end) in enumerate(ctas_P7):
        for b in range(first, last):
            if end > begin:
                yield p, b, begin, end, length, kv_len
            start, stop, length, kv_len = sequences_B4[min(b + 1, len(sequences_B4) - 1)]
            begin, end = 0, min(run_end, stop) - start


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 3000) | st.sampled_from([0, 1, 63, 64, 65, 2**31 - 1]), min_size=1, max_size=10),
    st.integers(1, 140),
    st.integers(1, 4),
)
@example([0], 1, 1)
@example([0, 0, 5, 0], 132, 2)
@example([8192] * 128, 132, 2)
def test_tiles_are_scheduled_once_and_partial_results_have_split_indices_of_their_own(lengths, num_ctas, min_tiles):
    capacity = 2500
    work = jitted(jnp.array(lengths, jnp.int32), capacity, TILE, num_ctas, min_tiles)
    found, splits = {b: [] for b in range(len(lengths))}, {b: [] for b in range(len(lengths))}
    for p, b, begin, end, length, kv_len in walk(work):
        found[b].extend(range(begin, end))
        splits[b].append(p + b)
        assert (length, kv_len) == (lengths[b], min(lengths[b], capacity))
    for b, length in enumerate(lengths):
        assert found[b] == list(range(-(-min(length, capacity) // TILE)))
        first, count = np.asarray(work.splits_B2)[b].tolist()
        assert splits[b] == list(range(first, first + count))
    used = [split for some in splits.values() for split in some]
    assert len(used) == len(set(used)) and all(split < num_ctas + len(lengths) for split in used)


def test_shares_are_equal_but_for_the_last():
    work = jitted(jnp.array([10_000, 3, 5000], jnp.int32), 2**20, TILE, 7, 1)
    sizes = [0] * 7
    for p, _, begin, end, *_ in walk(work):
        sizes[p] += end - begin
    assert sizes == [34, 34, 34, 34, 34, 34, 33]


@pytest.mark.parametrize(("batch", "splits"), [(128, 128), (32, 128)])
def test_equal_sequences_are_not_cut_more_often_than_needed(batch, splits):
    work = jitted(jnp.full(batch, 8192, jnp.int32), 8192, TILE, 132, 2)
    assert np.asarray(work.splits_B2)[:, 1].sum() == splits
