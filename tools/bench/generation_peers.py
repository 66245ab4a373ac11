"""Peers of `tools.bench.generate`: transformers' DeepseekV3, and our model with an expanded KV cache (MHA-style)."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.bridge.hf.config import to_hf
from mla_jax.bridge.hf.layout import tensors
from mla_jax.bridge.hf.verify import import_transformers
from mla_jax.config import ModelConfig
from mla_jax.inference.generator import DECODE_BLOCK
from mla_jax.model.decoder import bind_layer, logits
from mla_jax.model.layers import matmul, rms_norm
from mla_jax.model.rope import rope_cos_sin, softmax_scale
from mla_jax.model.transformer import embed

STEPS = 16
"""Tokens that transformers decodes; the median step counts."""


class Transformers:
    """DeepseekV3ForCausalLM with our parameters in the compute type.

    Args:
        config: the model.
        params: on the host.
        attention: `eager` or `sdpa`.
    """

    def __init__(self, config: ModelConfig, params: dict, attention: str):
        self.torch, transformers = import_transformers()
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        hf = to_hf(config, dtype=config.dtype, special_ids={})
        for key in ("architectures", "model_type", "dtype"):
            hf.pop(key)
        dtype = getattr(self.torch, config.dtype)
        hf_config = transformers.DeepseekV3Config(**hf)
        with self.torch.device(self.device):
            self.model = transformers.AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation=attention
            ).eval()
        state = self.model.state_dict()
        for tensor in tensors(config):
            state[tensor.name].copy_(self.torch.from_numpy(np.array(tensor.take(params))))

    def measure(self, tokens: int) -> dict[str, Any]:
        """Seconds to read a prompt (the second time) and of a step behind it, and the most memory PyTorch had."""
        torch = self.torch
        prompt = torch.randint(0, self.model.config.vocab_size, (1, tokens), device=self.device)
        with torch.inference_mode():
            for _ in range(2):
                out = cache = None
                self._reset_peak()
                start = self._now()
                out = self.model(prompt, use_cache=True, logits_to_keep=1)
                first = out.logits[:, -1:].argmax(-1)
                prefill = self._now() - start
                cache, out = out.past_key_values, None
            seconds = []
            for _ in range(STEPS):
                start = self._now()
                out = self.model(first, past_key_values=cache, use_cache=True)
                first = out.logits[:, -1:].argmax(-1)
                seconds.append(self._now() - start)
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        return {"prefill_seconds": prefill, "step_seconds": sorted(seconds)[STEPS // 2], "peak_bytes": peak}

    def _now(self) -> float:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def _reset_peak(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _expanded_steps(config: ModelConfig, weights: dict, tokens_B: jax.Array, caches: list, length: jax.Array):
    """DECODE_BLOCK greedy tokens over the expanded cache, [B, S, H, K] and [B, S, H, V] a layer."""

    def next_token(carry, _):
        tokens_B, caches, length = carry
        cos_sin = rope_cos_sin(config, jnp.full((len(tokens_B), 1), length))
        h, kept = embed(config, weights["embed_tokens"], tokens_B[:, None]), []
        for layer_weights, (k_BSHK, v_BSHV) in zip(weights["layers"], caches, strict=True):
            layer = bind_layer(config, layer_weights)
            attention, x = layer.self_attn, layer.attention_input(h)
            c, k_rope = attention.latents(x, cos_sin)
            k, v = attention.expand(matmul(c, attention.kv_b_proj), k_rope)
            k_BSHK = jax.lax.dynamic_update_slice_in_dim(k_BSHK, k, length, 1)
            v_BSHV = jax.lax.dynamic_update_slice_in_dim(v_BSHV, v, length, 1)
            q = jnp.concatenate(attention.queries(x, cos_sin), axis=-1)
            lengths = jnp.full(len(tokens_B), length + 1, jnp.int32)
            out = jax.nn.dot_product_attention(
                q, k_BSHK, v_BSHV, scale=softmax_scale(config), key_value_seq_lengths=lengths,
                implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
            )  # fmt: skip
            h = layer.add_feed_forward(h + attention.output(out))
            kept.append((k_BSHK, v_BSHV))
        h = rms_norm(h, weights["norm"], config.rms_norm_eps)
        tokens_B = jnp.argmax(logits(config, weights, h[:, 0]), axis=-1).astype(jnp.int32)
        return (tokens_B, kept, length + 1), None

    return jax.lax.scan(next_token, (tokens_B, caches, length), None, length=DECODE_BLOCK)[0]


def measure_expanded(config: ModelConfig, weights: dict, tokens: int) -> dict[str, Any]:
    """Seconds of a step over so many random cached tokens, and the bytes of the cache.

    The cache is that of multi-head attention, keys and values of every head; the model and its weights are the same.
    """
    heads, capacity = config.num_attention_heads, tokens + 4 * DECODE_BLOCK

    @jax.jit
    def random(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        k_key, v_key = jax.random.split(key)
        k = jax.random.normal(k_key, (1, capacity, heads, config.qk_head_dim), config.dtype)
        return k, jax.random.normal(v_key, (1, capacity, heads, config.v_head_dim), config.dtype)

    caches = [random(jax.random.key(i)) for i in range(config.num_hidden_layers)]
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(caches))
    state, seconds = (jnp.zeros(1, jnp.int32), caches, jnp.int32(tokens)), []
    for _ in range(4):
        start = time.perf_counter()
        state = _expanded_steps(config, weights, *state)
        np.asarray(state[0])
        seconds.append((time.perf_counter() - start) / DECODE_BLOCK)
    return {"step_seconds": sorted(seconds[1:])[1], "cache_bytes": cache_bytes * tokens // capacity}
