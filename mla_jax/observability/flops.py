"""Floating-point operations of training, and the share of the hardware's peak that they use (MFU).

Counted are the multiplications and additions of matrix products, as PaLM does (arXiv 2204.02311, appendix B): a product
of [m, k] and [k, n] is 2 m k n. The backward pass costs twice the forward pass; what rematerialisation computes again
is not counted, for it brings the training no further. Other than PaLM, causal attention counts at half the pairs of
tokens, as the masked half is not computed. Not counted: norms, rotations, softmax, activations, the loss, the
optimizer (Muon's products too), the lookup of embeddings.
"""

import functools
import time

import jax
import jax.numpy as jnp

from mla_jax.config import MeshConfig, ModelConfig
from mla_jax.mesh import make_mesh


def forward_flops(model: ModelConfig, batch_size: int, seq_len: int, logits: int | None = None) -> float:
    """FLOPs of one forward pass over [batch_size, seq_len] tokens in the expanded form.

    Attention counts seq_len^2 / 2 pairs a sequence, also where packing and branches let tokens not see each other.

    Args:
        model: the widths.
        batch_size: sequences.
        seq_len: tokens of each.
        logits: tokens of each that get logits; None for all.
    """
    d, heads, c = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    q_width, v_width = heads * model.qk_head_dim, heads * model.v_head_dim
    q_rank = model.q_lora_rank
    queries = d * q_width if q_rank is None else q_rank * (d + q_width)
    keys_and_values = d * model.cache_width + c * (heads * model.qk_nope_head_dim + v_width)
    feed_forward = 3 * d * model.intermediate_size
    layer = queries + keys_and_values + v_width * d + feed_forward  # multiply-adds a token
    attention = seq_len / 2 * (q_width + v_width)
    in_layers = model.num_hidden_layers * (layer + attention) * seq_len
    in_head = d * model.vocab_size * (seq_len if logits is None else logits)
    return 2.0 * (in_layers + in_head) * batch_size


def train_flops(model: ModelConfig, batch_size: int, seq_len: int, logits: int | None = None) -> float:
    """FLOPs of one training step: three times the forward pass."""
    return 3 * forward_flops(model, batch_size, seq_len, logits)


def measured_peak(size: int = 8192, products: int = 20) -> float:
    """FLOP/s of bfloat16 matrix products [size, size] one after another on the first local device.

    Random numbers, as products of zeros draw less power and run faster. The best of five timings of `products` each.
    """
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
        a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
        b *= size**-0.5  # so that products are as large as their factors

        @functools.partial(jax.jit, donate_argnums=0)
        def chain(a: jax.Array, b: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, products, lambda _, x: x @ b, a)

        def seconds() -> float:
            nonlocal a
            start = time.perf_counter()
            a = jax.block_until_ready(chain(a, b))
            return time.perf_counter() - start

        seconds()  # compiles
        return products * 2 * size**3 / min(seconds() for _ in range(5))
