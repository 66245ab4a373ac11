"""Branches on a GPU, in 16 bits: cuDNN for the prompt region, Triton for what is merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.model.transformer import init_params
from tiny import MODEL
from tools.bench.preference import difference, random_pairs, sigmoid_loss, steps
from tools.bench.steps import Shape

CONFIG = dataclasses.replace(
    MODEL, hidden_size=256, num_attention_heads=4, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128,
    kv_lora_rank=128, intermediate_size=512, max_position_embeddings=4096, dtype="bfloat16", initializer_range=0.05,
)  # fmt: skip


@pytest.mark.parametrize("answer", [128, 50])
def test_one_pass_and_two_agree_within_the_rounding_of_bfloat16(answer):
    """Two passes in float32 say what is right; one pass in bfloat16 may be as far from it as two are."""
    params, batch = init_params(CONFIG, 0), random_pairs(CONFIG, Shape(2, 2048 + 2 * answer), answer)
    found = {}
    for dtype in ("float32", "bfloat16"):
        for way, step in steps(dataclasses.replace(CONFIG, dtype=dtype), answer, 64).items():
            if dtype == "bfloat16" or way == "two passes at once":
                found[way, dtype] = jax.jit(step)(params, batch, jnp.zeros((2, 2)))
    right, log_probs = found["two passes at once", "float32"]
    one, two = (found[way, "bfloat16"] for way in ("one pass", "two passes at once"))
    np.testing.assert_allclose(sigmoid_loss(one[1]), sigmoid_loss(log_probs), atol=2e-2)
    assert difference(two[0], right)["difference"] < 0.1
    assert difference(one[0], right)["difference"] < 1.5 * difference(two[0], right)["difference"]
