"""The conditions for the fused batch-1 kernels; what they compute is tested on a GPU."""

import dataclasses
import sys

import jax
import pytest

import latent_attention.dispatch
from latent_attention import jax_triton_loader
from latent_attention.gpu import make_gpu
from mla_jax.config import MeshConfig
from mla_jax.mesh import make_mesh
from mla_jax.model import fused_decode
from mla_jax.model.cache import init_layer
from tiny import MODEL

CONFIG = dataclasses.replace(
    MODEL, num_attention_heads=16, qk_nope_head_dim=16, qk_rope_head_dim=32, kv_lora_rank=64, q_lora_rank=16,
    dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def ampere(monkeypatch):
    """Makes the choice of kernels see an A100 with jax-triton."""
    on(monkeypatch, (8, 0))
    monkeypatch.setattr(jax_triton_loader, "why_not", lambda: None)


def on(monkeypatch, capability):
    for module in (latent_attention.dispatch, fused_decode):
        monkeypatch.setattr(module, "local_gpu", lambda: capability and make_gpu(capability, 108))


def why_not(rows=1, cache_dtype=None, int8_weights=False, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    cache = jax.eval_shape(lambda: init_layer(config, rows, 64, cache_dtype))
    return fused_decode.why_not(config, (cache,), int8_weights)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_row_in_16_bits_takes_the_fused_kernels(dtype, cache_dtype):
    assert why_not(dtype=dtype, cache_dtype=cache_dtype) is None


def test_what_the_fused_kernels_cannot_do_goes_through_xla(monkeypatch):
    assert "one row" in why_not(rows=2)
    assert "q_lora_rank" in why_not(q_lora_rank=None)
    odd = {"intermediate_size": CONFIG.intermediate_size + 2}
    assert why_not(**odd) is None and "multiples of 4" in why_not(int8_weights=True, **odd)
    assert "float32" in why_not(dtype="float32")
    assert "xla" in why_not(decode="xla")
    monkeypatch.setenv("LATENT_DECODE_IMPLEMENTATION", "xla")
    assert "xla" in why_not()
    monkeypatch.delenv("LATENT_DECODE_IMPLEMENTATION")
    for capability in [(7, 5), None]:
        on(monkeypatch, capability)
        assert "xla" in why_not()


def test_on_hopper_a_layer_is_fused_layer_where_it_fits(monkeypatch):
    fitting = dataclasses.replace(
        CONFIG, hidden_size=1280, num_attention_heads=16, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=128,
        kv_lora_rank=256, q_lora_rank=512, intermediate_size=1536,
    )  # fmt: skip

    def is_fused_layer(int8_weights=False, cache_dtype=None, **changes):
        config = dataclasses.replace(fitting, **changes)
        cache = jax.eval_shape(lambda: init_layer(config, 1, 64, cache_dtype))
        return fused_decode.is_fused_layer(config, cache, int8_weights)

    assert not is_fused_layer()  # on an A100
    on(monkeypatch, (9, 0))
    assert is_fused_layer()
    assert is_fused_layer(int8_weights=True, hidden_size=1536)
    assert not is_fused_layer(int8_weights=True)  # rows of 1,280 bytes are no whole words of all threads
    assert is_fused_layer(cache_dtype="int8")
    assert is_fused_layer(cache_dtype="int8", int8_weights=True, hidden_size=1536)
    assert not is_fused_layer(decode="triton")
    assert not is_fused_layer(kv_lora_rank=512)
    monkeypatch.setitem(sys.modules, "latent_attention.decode_layer.mosaic", None)  # as with a JAX that it cannot use
    monkeypatch.delattr(latent_attention.decode_layer, "mosaic", raising=False)
    assert not is_fused_layer()


def test_a_mesh_goes_through_xla_even_of_one_device():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert "mesh" in why_not()
