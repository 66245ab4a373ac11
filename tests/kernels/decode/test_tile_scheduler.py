"""Every tile of every sequence is somebody's, once, and the combining kernel finds its partial result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latent_attention.decode.tile_scheduler import schedule

TILE = 64
jitted = jax.jit(schedule, static_argnums=(1, 2, 3, 4))


def walk(plan):
    """As the kernel does: (program, sequence, first tile, one past its last, length, held) of each piece of work."""
    programs_P7, sequences_B4, _ = (np.asarray(x).tolist() for x in plan)
    for p, (first, last, begin, end, length, held, share_end) in enumerate(programs_P7):
        for b in range(first, last):
            if end > begin:
                yield p, b, begin, end, length, held
            start, stop, length, held = sequences_B4[min(b + 1, len(sequences_B4) - 1)]
            begin, end = 0, min(share_end, stop) - start


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 3000) | st.sampled_from([0, 1, 63, 64, 65, 2**31 - 1]), min_size=1, max_size=10),
    st.integers(1, 140),
    st.integers(1, 4),
)
@example([0], 1, 1)
@example([0, 0, 5, 0], 132, 2)
@example([8192] * 128, 132, 2)
def test_tiles_are_dealt_out_once_and_results_have_slots_of_their_own(lengths, programs, least):
    capacity = 2500
    plan = jitted(jnp.array(lengths, jnp.int32), capacity, TILE, programs, least)
    found, slots = {b: [] for b in range(len(lengths))}, {b: [] for b in range(len(lengths))}
    for p, b, begin, end, length, held in walk(plan):
        found[b].extend(range(begin, end))
        slots[b].append(p + b)
        assert (length, held) == (lengths[b], min(lengths[b], capacity))
    for b, length in enumerate(lengths):
        assert found[b] == list(range(-(-min(length, capacity) // TILE)))
        first, count = np.asarray(plan.slots_B2)[b].tolist()
        assert slots[b] == list(range(first, first + count))
    used = [slot for some in slots.values() for slot in some]
    assert len(used) == len(set(used)) and all(slot < programs + len(lengths) for slot in used)


def test_shares_are_equal_but_for_the_last():
    plan = jitted(jnp.array([10_000, 3, 5000], jnp.int32), 2**20, TILE, 7, 1)
    sizes = [0] * 7
    for p, _, begin, end, *_ in walk(plan):
        sizes[p] += end - begin
    assert sizes == [34, 34, 34, 34, 34, 34, 33]


@pytest.mark.parametrize(("batch", "slots"), [(128, 128), (32, 128)])
def test_equal_sequences_are_not_cut_more_often_than_needed(batch, slots):
    plan = jitted(jnp.full(batch, 8192, jnp.int32), 8192, TILE, 132, 2)
    assert np.asarray(plan.slots_B2)[:, 1].sum() == slots
