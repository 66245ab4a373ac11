"""Multi-Head Latent Attention, in two forms that agree.

Expanded (training, prefill): keys and values of every head are computed from the latents, then plain attention.
Absorbed (decode): the up-projections move to the query and the output side, and all heads attend to the latents
themselves. It reads 1/H of the elements and takes about three times the multiplications.

Equations are those of DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import latent_attention
from mla_jax import mesh
from mla_jax.config import ModelConfig
from mla_jax.errors import UsageError
from mla_jax.model import cache as latent_cache
from mla_jax.model import context_parallel
from mla_jax.model.branches import Branches
from mla_jax.model.branches import attend as attend_to_branches
from mla_jax.model.cache import LayerCache
from mla_jax.model.layers import all_gather_weight, init_matrix, init_norm_weight, matmul, rms_norm
from mla_jax.model.rope import CosSin, apply_rope, softmax_scale

CACHE_CHUNK = 8192
"""Cached tokens, of all rows together, whose keys and values exist at one time during prefill."""
MIN_CACHE_CHUNK = 512
"""The fewest tokens of a row in such a chunk."""


class MLA(nnx.Module):
    """Attention of one layer; leaves carry Hugging Face's names, matrices are [in, out]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        d, heads, c = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        new = functools.partial(init_matrix, config, rngs)
        if config.q_lora_rank is None:
            self.q_proj = new((d, heads * config.qk_head_dim), mesh.SHARD_IN)
        else:
            self.q_a_proj = new((d, config.q_lora_rank), mesh.SHARD_IN)
            self.q_a_layernorm = init_norm_weight(config, config.q_lora_rank)
            self.q_b_proj = new((config.q_lora_rank, heads * config.qk_head_dim), mesh.SHARD_OUT)
        self.kv_a_proj_with_mqa = new((d, config.cache_width), mesh.SHARD_IN)
        self.kv_a_layernorm = init_norm_weight(config, c)
        self.kv_b_proj = new((c, heads * (config.qk_nope_head_dim + config.v_head_dim)), mesh.SHARD_OUT)
        self.o_proj = new((heads * config.v_head_dim, d), mesh.SHARD_OUT)

    def __call__(
        self, x_BTD: jax.Array, cos_sin: CosSin, segments_BT: jax.Array | None, branches: Branches | None = None
    ) -> jax.Array:
        """Expanded form over a whole sequence; no attention across segments, or as `branches` says."""
        latents = self.latents(x_BTD, cos_sin)
        q_BTHK = checkpoint_name(jnp.concatenate(self.queries(x_BTD, cos_sin), axis=-1), "queries")
        shards = mesh.num_sequence_shards(x_BTD)

        def attend(q_BTHK, latents, segments_BT, branches, kv_b_CX):
            causal = functools.partial(self._causal, kv_b_CX, shards)
            if branches is None:
                return causal(q_BTHK, latents, segments_BT)
            return attend_to_branches(branches, shards, q_BTHK, latents, causal, functools.partial(self._part, kv_b_CX))

        kv_b_CX = mesh.all_gather(self.kv_b_proj[...])
        return self.output(mesh.per_device(attend, q_BTHK, latents, segments_BT, branches, kv_b_CX))

    def _causal(self, kv_b_CX, shards: int, q_BTHK, latents, segments_BT) -> jax.Array:
        """Output of the tokens on this device, which see their segment up to themselves."""
        if shards == 1:
            return self._part(kv_b_CX, q_BTHK, latents, 0, segments_BT, segments_BT)[0]
        ops = context_parallel.Ops(
            self._keys_and_values, functools.partial(self._op, latent_attention.attention),
            functools.partial(self._op, latent_attention.attention_gradients),
        )  # fmt: skip
        return context_parallel.attention(ops, q_BTHK, latents, kv_b_CX, segments_BT)

    def _part(self, kv_b_CX, q_BTHK, latents, q_offset, q_segments, kv_segments) -> tuple[jax.Array, jax.Array]:
        """Output and log-sum-exp of queries over the keys of these latents."""
        c_BSC, k_rope_BSR = latents
        k_BSHK, v_BSHV = self._keys_and_values(c_BSC, k_rope_BSR, kv_b_CX)
        return self._op(
            latent_attention.attention, q_BTHK, k_BSHK, v_BSHV, q_offset=q_offset, q_segments=q_segments,
            kv_segments=kv_segments, return_lse=True,
        )  # fmt: skip

    def _keys_and_values(self, c_BSC, k_rope_BSR, kv_b_CX) -> tuple[jax.Array, jax.Array]:
        return self.expand(matmul(c_BSC, kv_b_CX), k_rope_BSR)

    def append_to_cache(
        self, x_BTD: jax.Array, cos_sin: CosSin, cache: LayerCache, lengths_B: jax.Array, valid_B: jax.Array
    ) -> tuple[LayerCache, jax.Array, jax.Array]:
        """Appends the first `valid_B` of T new tokens to the `lengths_B` cached ones; returns their latents too."""
        c_BTC, k_rope_BTR = self.latents(x_BTD, cos_sin)
        return latent_cache.write(cache, lengths_B, c_BTC, k_rope_BTR, valid_B), c_BTC, k_rope_BTR

    def extend(
        self, x_BTD: jax.Array, cos_sin: CosSin, cache: LayerCache, lengths_B: jax.Array, valid_B: jax.Array,
        absorbed: bool,
    ) -> tuple[jax.Array, LayerCache]:  # fmt: skip
        """Attends from T new tokens to the cache and to themselves, and appends them to the cache."""
        cache, c_BTC, k_rope_BTR = self.append_to_cache(x_BTD, cos_sin, cache, lengths_B, valid_B)
        q_nope_BTHN, q_rope_BTHR = self.queries(x_BTD, cos_sin)
        if absorbed:
            out_BTHV = self._absorbed(q_nope_BTHN, q_rope_BTHR, cache, lengths_B)
        else:
            q_BTHK = jnp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1)
            out_BTHV = self._expanded(q_BTHK, c_BTC, k_rope_BTR, cache, lengths_B)
        return self.output(out_BTHV), cache

    def queries(self, x_BTD: jax.Array, cos_sin: CosSin) -> tuple[jax.Array, jax.Array]:
        """Queries: q_BTHN and the rotated q_BTHR; equations 12 to 14."""
        config = self.config
        if config.q_lora_rank is None:
            q = matmul(x_BTD, self.q_proj)
        else:
            q = matmul(x_BTD, self.q_a_proj)
            q = matmul(rms_norm(q, self.q_a_layernorm, config.rms_norm_eps), self.q_b_proj)
        q_BTHK = q.reshape(*q.shape[:2], config.num_attention_heads, config.qk_head_dim)
        q_nope_BTHN, q_rope_BTHR = jnp.split(q_BTHK, [config.qk_nope_head_dim], axis=-1)
        cos, sin = cos_sin
        return q_nope_BTHN, apply_rope(q_rope_BTHR, cos[:, :, None], sin[:, :, None])

    def latents(self, x_BTD: jax.Array, cos_sin: CosSin) -> tuple[jax.Array, jax.Array]:
        """The latent after its norm, c_BTC, and the rotated key k_rope_BTR, which are cached; equations 9 and 15."""
        config = self.config
        kv_a_BTW = checkpoint_name(matmul(x_BTD, self.kv_a_proj_with_mqa), "latents")
        c_BTC, k_rope_BTR = jnp.split(kv_a_BTW, [config.kv_lora_rank], axis=-1)
        return rms_norm(c_BTC, self.kv_a_layernorm, config.rms_norm_eps), apply_rope(k_rope_BTR, *cos_sin)

    def expand(self, kv_BSX: jax.Array, k_rope_BSR: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys k_BSHK and values v_BSHV from up-projected latents and the shared rotary key; equations 10, 11, 17."""
        kv_BSHX = kv_BSX.reshape(*kv_BSX.shape[:2], self.config.num_attention_heads, -1)
        k_nope_BSHN, v_BSHV = jnp.split(kv_BSHX, [self.config.qk_nope_head_dim], axis=-1)
        k_rope_BSHR = jnp.broadcast_to(k_rope_BSR[:, :, None], (*k_nope_BSHN.shape[:3], k_rope_BSR.shape[-1]))
        return jnp.concatenate([k_nope_BSHN, k_rope_BSHR], axis=-1), v_BSHV

    def output(self, out_BTHV: jax.Array) -> jax.Array:
        """x_BTD of the outputs of all heads; equation 19."""
        return matmul(out_BTHV.reshape(*out_BTHV.shape[:2], -1), self.o_proj)

    def _op(self, op: Callable, *arrays: jax.Array, **options):
        """Calls an op of `latent_attention` with this model's softmax scale and choice of implementation."""
        key = "decode" if op is latent_attention.decode else "attention"  # of the config
        try:
            return op(*arrays, scale=softmax_scale(self.config), implementation=getattr(self.config, key), **options)
        except latent_attention.UnavailableError as e:
            raise UsageError(f"model.{key}: {e}") from e

    def _expanded(self, q_BTHK, c_BTC, k_rope_BTR, cache: LayerCache, lengths_B: jax.Array) -> jax.Array:
        """New tokens attend to themselves, then to the cache chunk by chunk: memory does not grow with the cache."""

        def attend(q, c_new, k_rope_new, cache, lengths, kv_b_CX):
            size = min(max(CACHE_CHUNK // len(q), MIN_CACHE_CHUNK), cache.capacity)

            def chunk(i, carry):
                start = i * size
                c, k_rope = latent_cache.read(cache, start, size, q.dtype)
                k, v = self.expand(c @ kv_b_CX, k_rope)
                valid = jnp.clip(lengths - start, 0, size)
                # An offset of `size` lets every query see the whole chunk.
                part = self._op(latent_attention.attention, q, k, v, q_offset=size, kv_lengths=valid, return_lse=True)
                return latent_attention.merge(*carry, *part)

            k, v = self.expand(c_new @ kv_b_CX, k_rope_new)
            out, lse = self._op(latent_attention.attention, q, k, v, return_lse=True)
            chunks = (jnp.max(lengths) + size - 1) // size
            # Merged in float32: with many chunks, rounding errors would add up.
            return jax.lax.fori_loop(0, chunks, chunk, (out.astype(jnp.float32), lse))[0].astype(q.dtype)

        kv_b_CX = all_gather_weight(self.kv_b_proj, q_BTHK.dtype)
        return mesh.per_device(attend, q_BTHK, c_BTC, k_rope_BTR, cache, lengths_B, kv_b_CX)

    def _absorbed(self, q_nope_BTHN, q_rope_BTHR, cache: LayerCache, lengths_B: jax.Array) -> jax.Array:
        """Attention of new tokens, which are in the cache already, to all of it; end of section 2.1.2."""
        kv_b_CX = all_gather_weight(self.kv_b_proj, q_nope_BTHN.dtype)
        kv_b_CHX = kv_b_CX.reshape(kv_b_CX.shape[0], self.config.num_attention_heads, -1)
        k_b_CHN, v_b_CHV = jnp.split(kv_b_CHX, [self.config.qk_nope_head_dim], axis=-1)

        def attend(q_BTHW, cache, lengths):
            arrays, seen = (cache.c_BSC, cache.k_rope_BSR), lengths + q_BTHW.shape[1]
            return self._op(latent_attention.decode, q_BTHW, *arrays, seen, scales_P2S=cache.scales_B2S)[0]

        q_BTHC = jnp.einsum("bthn,chn->bthc", q_nope_BTHN, k_b_CHN)
        q_BTHW = jnp.concatenate([q_BTHC, q_rope_BTHR], axis=-1)
        out_BTHC = mesh.per_device(attend, q_BTHW, cache, lengths_B)
        return jnp.einsum("bthc,chv->bthv", out_BTHC, v_b_CHV)


def scale_queries(params: dict, factor: float) -> dict:
    """Parameters whose attention scores are `factor` times as large, which makes the softmax sharper.

    That is a softmax scale times `factor`, without a word in any config. `params` are laid out as `init_params` does.
    """
    attention = params["layers"]["self_attn"]
    key = "q_b_proj" if "q_b_proj" in attention else "q_proj"
    attention = attention | {key: attention[key] * factor}
    return params | {"layers": params["layers"] | {"self_attn": attention}}
