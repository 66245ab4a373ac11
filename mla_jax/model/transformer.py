"""The decoder: embeddings, L layers of MLA and SwiGLU, final norm, head.

Parameters travel as a plain nested dict whose leaves carry Hugging Face's names (`init_params`); `bind` puts them into
the NNX modules that compute with them. Layers are stacked on axis 0 and scanned.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mla_jax import mesh
from mla_jax.config import ModelConfig
from mla_jax.model.branches import Branches
from mla_jax.model.cache import LayerCache
from mla_jax.model.layers import init_matrix, init_norm_weight, join_chunks, matmul, rms_norm, split_tokens
from mla_jax.model.mla import MLA
from mla_jax.model.rope import CosSin, rope_cos_sin


def _rematerialized(config: ModelConfig, body: Callable) -> Callable:
    """`body` with a backward pass that saves the activations that the config names and recomputes the rest."""
    policies = jax.checkpoint_policies
    if config.remat == "none":
        return body
    if config.remat == "names":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=config.saved, names_which_can_be_offloaded=config.offloaded,
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    elif config.remat == "dots":
        attention = policies.save_only_these_names("latent_attention")
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention)
    else:
        policy = policies.nothing_saveable
    return jax.checkpoint(body, policy=policy)


class SwiGLU(nnx.Module):
    """Feed-forward (arXiv 2002.05202): silu(x gate) * (x up), projected down."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.chunk = config.mlp_chunk
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = init_matrix(config, rngs, (d, f), mesh.SHARD_IN)
        self.up_proj = init_matrix(config, rngs, (d, f), mesh.SHARD_IN)
        self.down_proj = init_matrix(config, rngs, (f, d), mesh.SHARD_OUT)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        weights = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        if self.chunk is None:
            return self._feed_forward(x_BTD, *weights)
        in_chunks = functools.partial(self._chunk_by_chunk, self.chunk)
        return mesh.per_device(in_chunks, x_BTD, *(mesh.all_gather(w) for w in weights))

    @staticmethod
    def _feed_forward(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
        gate_BTF = checkpoint_name(matmul(x_BTD, gate_DF), "gate")
        up_BTF = checkpoint_name(matmul(x_BTD, up_DF), "up")
        return matmul(jax.nn.silu(gate_BTF) * up_BTF, down_FD)

    def _chunk_by_chunk(self, chunk: int, x_BTD: jax.Array, *weights: jax.Array) -> jax.Array:
        def body(_, x_BtD):
            return None, self._feed_forward(x_BtD, *weights)

        chunks = split_tokens(x_BTD, chunk)
        return join_chunks(jax.lax.scan(jax.checkpoint(body), None, chunks)[1], x_BTD.shape[1])


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.input_layernorm = init_norm_weight(config, config.hidden_size)
        self.self_attn = MLA(config, rngs)
        self.post_attention_layernorm = init_norm_weight(config, config.hidden_size)
        self.mlp = SwiGLU(config, rngs)

    def __call__(
        self, h_BTD: jax.Array, cos_sin: CosSin, segments_BT: jax.Array | None, branches: Branches | None
    ) -> jax.Array:
        """The layer over a whole sequence."""
        h_BTD = checkpoint_name(h_BTD, "layer_input")
        h_BTD += self.self_attn(self.attention_input(h_BTD), cos_sin, segments_BT, branches)
        return self.add_feed_forward(checkpoint_name(h_BTD, "attention_residual"))

    def extend(self, h_BTD, cos_sin: CosSin, cache: LayerCache, lengths_B, valid_B, absorbed: bool):
        """The layer over new tokens behind a cache; see `MLA.extend`."""
        x_BTD = self.attention_input(h_BTD)
        out_BTD, cache = self.self_attn.extend(x_BTD, cos_sin, cache, lengths_B, valid_B, absorbed)
        return self.add_feed_forward(h_BTD + out_BTD), cache

    def append_to_cache(self, h_BTD, cos_sin: CosSin, cache: LayerCache, lengths_B, valid_B) -> LayerCache:
        """Only appends new tokens to the cache: all that prefill needs of the last layer."""
        return self.self_attn.append_to_cache(self.attention_input(h_BTD), cos_sin, cache, lengths_B, valid_B)[0]

    def attention_input(self, h_BTD: jax.Array) -> jax.Array:
        """Hidden states after the first norm."""
        return rms_norm(h_BTD, self.input_layernorm, self.config.rms_norm_eps)

    def add_feed_forward(self, h_BTD: jax.Array) -> jax.Array:
        """Hidden states plus the feed-forward of their norm."""
        return h_BTD + self.mlp(rms_norm(h_BTD, self.post_attention_layernorm, self.config.rms_norm_eps))


class Transformer(nnx.Module):
    """The model; `bind` makes one from parameters."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = init_matrix(
            config, rngs, (config.vocab_size, config.hidden_size), mesh.SHARD_OUT, config.embedding_initializer_range
        )
        self.layers = jax.vmap(lambda r: Layer(config, r))(rngs.split(config.num_hidden_layers))
        self.norm = init_norm_weight(config, config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = init_matrix(config, rngs, (config.hidden_size, config.vocab_size), mesh.SHARD_IN)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        branches: Branches | None = None,
    ) -> jax.Array:
        """Hidden states of a whole batch, after the final norm.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: int32 rotary positions; None for 0, 1, 2, ... (not with branches or on `context`)
            segments_BT: int32 document of each token, which sees only its own; None for one document a row.
            branches: for rows that are prompts and their continuations, in place of segments_BT.

        Returns:
            h_BTD in the compute type; see `logits`.
        """
        if positions_BT is None:
            if mesh.num_sequence_shards(tokens_BT) > 1:
                raise ValueError("positions_BT must be given where sequences are sharded: tokens are in zig-zag order")
            if branches is not None:
                raise ValueError("positions_BT must be given with branches: those of a branch go on from its prompt")
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        cos_sin = rope_cos_sin(self.config, positions_BT)

        def body(h_BTD, layer):
            return layer(h_BTD, cos_sin, segments_BT, branches), None

        body = _rematerialized(self.config, body)
        unroll = self.config.num_hidden_layers if self.config.unroll == -1 else self.config.unroll
        h_BTD, _ = jax.lax.scan(body, embed(self.config, self.embed_tokens, tokens_BT), self.layers, unroll=unroll)
        return rms_norm(h_BTD, self.norm, self.config.rms_norm_eps)

    def logits(self, h: jax.Array) -> jax.Array:
        """float32 logits [..., X] of hidden states [..., D]."""
        return matmul(h, self.head(), jnp.float32)

    def head(self) -> jax.Array:
        """The weight [D, X] of the output head."""
        return self.embed_tokens[...].T if self.config.tie_word_embeddings else self.lm_head[...]


def embed(config: ModelConfig, table_XD: nnx.Param | jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """h_BTD in the compute type."""
    # Cast after the look-up: gradients of a row that occurs often are summed in the type of the parameters.
    h_BTD = mesh.per_device(lambda tokens, table: table[tokens], tokens_BT, mesh.all_gather(table_XD[...]))
    return h_BTD.astype(config.dtype)


def _initialised(config: ModelConfig, seed: int) -> dict:
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(jax.random.key(seed))), nnx.Param))


def init_params(config: ModelConfig, seed: int) -> dict:
    """Random parameters: nested dict of arrays in `param_dtype`, sharded where a mesh is set.

    Raises:
        UsageError: a weight does not divide over the mesh.
    """
    return jax.jit(_initialised, static_argnums=0)(config, seed)


def abstract_params(config: ModelConfig) -> dict:
    """Shapes, types and shardings of `init_params`, with nothing computed."""
    return jax.eval_shape(functools.partial(_initialised, config), 0)


def bind(config: ModelConfig, params: dict) -> Transformer:
    """The model that computes with these parameters (arrays, tracers or shapes); usable inside jit."""
    graph, state = nnx.split(jax.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
