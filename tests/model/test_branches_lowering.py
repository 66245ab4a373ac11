"""A pass with branches, lowered for a GPU that is not here."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from latent_attention import dispatch
from latent_attention.gpu import make_gpu
from mla_jax.losses.branch_log_probs import branch_log_probs
from mla_jax.model.transformer import abstract_params, bind
from tiny import MODEL

CONFIG = dataclasses.replace(
    MODEL, v_head_dim=16, dtype="bfloat16", remat="names", saved=("latent_attention", "queries", "latents")
)
PROMPT, SIZE = 256, 128


@pytest.mark.parametrize(
    ("packed", "expected"),
    [(False, {"Softmax CAUSAL": 1, "SoftmaxBackward CAUSAL": 1}), (True, {})],
    ids=["one prompt a row", "packed"],
)
def test_cudnn_attends_from_the_prompt_region_to_itself(packed, expected, monkeypatch):
    """Once in each direction, on the prompt region's shape; segments, and what is merged, it cannot do."""
    monkeypatch.setattr(dispatch, "local_gpu", lambda: make_gpu((9, 0), 132))

    def loss(params, rows):
        return jnp.sum(branch_log_probs(bind(CONFIG, params), rows, SIZE, packed, 64).log_probs_BR)

    names = "tokens positions targets prompts branches".split()
    rows = {name: jax.ShapeDtypeStruct((2, PROMPT + SIZE), jnp.int32) for name in names}
    traced = jax.jit(jax.grad(loss)).trace(abstract_params(CONFIG), rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"@__cudnn\$fmha(\w+)\(.*?mask_type[^A-Z]*([A-Z_]+).*?\(tensor<(\w+)>", text)
    assert collections.Counter(f"{name} {mask}" for name, mask, _ in found) == expected
    assert {shape for *_, shape in found} <= {f"2x{PROMPT}x2x16xbf16"}
