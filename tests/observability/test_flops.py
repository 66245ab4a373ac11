"""FLOPs against the matrix products in the traced training loss, and against numbers worked out elsewhere."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from mla_jax.hardware import NOMINAL_PEAK, nominal_peak
from mla_jax.model.transformer import abstract_params, bind
from mla_jax.observability.flops import forward_flops, measured_peak, train_flops
from tiny import MODEL


def products_in(jaxpr) -> int:
    """FLOPs of all matrix products of a traced function; what a scan repeats counts as often."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * summed * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * products_in(inner)
    return total


@pytest.mark.parametrize(
    ("changes", "logits"),
    [({}, 5), ({"q_lora_rank": 12}, None), ({"tie_word_embeddings": False, "v_head_dim": 16}, None)],
)
def test_flops_are_those_of_the_traced_products(changes, logits):
    model = dataclasses.replace(MODEL, attention="reference", **changes)
    rows, length = 3, 24
    tokens = jnp.zeros((rows, length), jnp.int32)

    def loss(params):
        transformer = bind(model, params)
        return jax.nn.logsumexp(transformer.logits(transformer(tokens)[:, : logits or length]), axis=-1).sum()

    params = abstract_params(model)
    forward, training = (products_in(jax.make_jaxpr(f)(params)) for f in (loss, jax.grad(loss)))
    # The reference multiplies all pairs of tokens, half of which causal attention does not need.
    head_widths = model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    half = rows * length * length * head_widths * model.num_hidden_layers
    assert forward - half == forward_flops(model, rows, length, logits)
    assert training - 3 * half == train_flops(model, rows, length, logits)


def test_infinite_1b_is_about_six_flops_a_parameter_and_token():
    from test_config import _compose

    model = _compose("model=infinite_1b").model
    assert train_flops(model, 1, 1) == pytest.approx(6 * 1.008e9, rel=0.001)
    # At 131,072 tokens attention dominates: 3 x 12 layers x 131,072 pairs x 32 heads x (128 + 128) a token.
    beyond = train_flops(model, 1, 131072) / 131072 - train_flops(model, 1, 1)
    assert beyond == pytest.approx(3 * 12 * 131072 * 32 * 256, rel=0.001)


def test_peaks_are_known_by_the_names_that_jax_gives():
    assert nominal_peak("NVIDIA H200") == nominal_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert nominal_peak("cpu") is None
    assert all(1e13 < peak < 1e16 for peak in NOMINAL_PEAK.values())


def test_the_measured_peak_is_a_rate_of_this_machine():
    assert 1e8 < measured_peak(size=128, products=2) < 1e15
