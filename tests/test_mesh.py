"""Placement of the rows and tokens of a batch on a mesh."""

import jax
import numpy as np
import pytest

from mla_jax.config import MeshConfig
from mla_jax.errors import UsageError
from mla_jax.mesh import check_batch, make_mesh, place_batch, rows_here


@pytest.mark.parametrize(("data", "fsdp", "context"), [(2, 2, 2), (1, 2, 4), (8, 1, 1)])
def test_each_device_holds_its_rows_and_an_early_and_a_late_chunk(data, fsdp, context):
    """The i-th of n devices holds the i-th of 2 n chunks of the tokens and the i-th from the end."""
    tokens = np.arange(16 * 32).reshape(16, 32)
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context))
    with jax.set_mesh(mesh):
        assert (rows_here(16, 2) == np.arange(16)).all()
        placed = place_batch({"tokens": tokens}, 2)["tokens"]
    shares = data * fsdp
    for shard in placed.addressable_shards:
        rows, i = divmod(list(mesh.devices.flat).index(shard.device), context)
        mine = tokens.reshape(2, shares, 8 // shares, 32)[:, rows]
        if context > 1:
            chunks = mine.reshape(2, -1, 2 * context, 32 // (2 * context))
            mine = np.concatenate([chunks[:, :, i], chunks[:, :, -1 - i]], axis=-1)
        np.testing.assert_array_equal(shard.data, mine)


def test_each_device_holds_its_part_of_the_branch_region_behind_its_chunks():
    """Rows of 24 tokens, of which the last 8 are branches, on 4 devices."""
    tokens = np.arange(24)[None] + np.array([[0], [100]])
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, context=4))):
        placed = place_batch({"tokens": tokens}, 1, branch_tokens=8)["tokens"]
    found = sorted(np.asarray(shard.data)[0, 0].tolist() for shard in placed.addressable_shards)
    expected = [[0, 1, 14, 15, 16, 17], [2, 3, 12, 13, 18, 19], [4, 5, 10, 11, 20, 21], [6, 7, 8, 9, 22, 23]]
    assert found == expected + [[x + 100 for x in row] for row in expected]


def test_what_does_not_spread_evenly_is_a_usage_error():
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, context=2))):
        with pytest.raises(UsageError, match=r"6 sequences .* do not spread evenly over 4 devices"):
            check_batch(12, 32, 2)
        with pytest.raises(UsageError, match="seq_len 30 is no multiple of 4, twice mesh.context"):
            check_batch(4, 30, 1)
        with pytest.raises(UsageError, match=r"seq_len 32 less data\.branch_tokens 6 is no multiple of 4, twice"):
            check_batch(4, 32, 1, branch_tokens=6)
        with pytest.raises(UsageError, match=r"data\.branch_tokens 7 is no multiple of mesh\.context=2"):
            check_batch(4, 31, 1, branch_tokens=7)
        check_batch(8, 32, 2)
        check_batch(8, 32, 2, branch_tokens=8)


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 4, "context": 4}, {"data": 2, "fsdp": 2, "context": 1}])
def test_sizes_that_do_not_cover_the_devices_are_a_usage_error(sizes):
    with pytest.raises(UsageError, match="does not cover 8 devices"):
        make_mesh(MeshConfig(**sizes))


def test_what_is_left_goes_to_the_axis_of_minus_one():
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1, context=2)).shape) == {"data": 2, "fsdp": 2, "context": 2}
