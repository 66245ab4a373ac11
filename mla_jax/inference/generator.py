"""Generation through the latent cache: prefill in chunks (expanded), decode in a compiled loop (absorbed).

A `Generator` has the weights. A `Context` is what it has read: prompts that start with the same tokens, the turns of a
chat or many questions about one long text, are read once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import mesh
from mla_jax.config import ModelConfig
from mla_jax.errors import InputError, UsageError
from mla_jax.hardware import available_memory
from mla_jax.inference.memory import GRANULE, MemoryPlan, most_that_fits, room_for, round_up
from mla_jax.inference.prompts import check_prompts, common_prefix, seen_tokens
from mla_jax.inference.sampling import Sampling, SamplingPlan, choose, knobs
from mla_jax.model import decoder, fused_decode
from mla_jax.model.cache import LatentCache, LayerCache, init_layer, resized
from mla_jax.model.rope import rope_cos_sin

PREFILL_CHUNK = 8192
"""Prompt tokens, of all rows together, that are processed at one time."""
DECODE_BLOCK = 32
"""Tokens that one call of the compiled loop adds; meanwhile, those of the call before are streamed or stop rows."""
_UNROLL = 4
"""Tokens that a turn of the compiled loop adds by the kernels for one token, beside which a turn's own time counts."""
_NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 2**30}
"""XLA leaves kernels of Triton out of CUDA graphs: there would be one between any two, which takes longer to start than
what is in it."""

OnTokens = Callable[[int, list[int]], bool | None]
"""Called with the row and its new tokens, a few at a time; True ends the row."""
OnPrefill = Callable[[int, int], None]
"""Called with how many tokens of all prompts have been read, and how many there are to read."""


def decode_block(
    config, weights, tokens_B, layers, lengths_B, done_B, seen_BX, values, key, first, *, plan: SamplingPlan, steps
):  # fmt: skip
    """The next `steps` tokens [N, B] of each row, and what the next call takes. Rows that are done hold still.

    `first` counts the tokens of earlier calls: the draws of a seed do not depend on how many tokens a call adds.
    `layers` and `seen_BX` are donated. Not for use inside another `jit`, as it has options for the compiler.
    """
    loop = _kernels_decode if fused_decode.why_not(config, layers) is None else _decode
    return loop(
        config, weights, tokens_B, layers, lengths_B, done_B, seen_BX, values, key, first, plan=plan, steps=steps
    )


_jit = functools.partial(jax.jit, static_argnames=("config", "plan", "steps"), donate_argnames=("layers", "seen_BX"))


@_jit
def _decode(config, weights, tokens_B, layers, lengths_B, done_B, seen_BX, values, key, first, *, plan, steps):
    def next_token(carry, number):
        tokens_B, cache, seen_BX = carry
        h_B1D, cache = decoder.extend(
            config, weights, tokens_B[:, None], cache, (~done_B).astype(jnp.int32), absorbed=True
        )
        scores_BX = decoder.logits(config, weights, h_B1D[:, 0])
        tokens_B, seen_BX = _chosen(plan, values, scores_BX, seen_BX, key, number)
        return (tokens_B, cache, seen_BX), tokens_B

    start = tokens_B, LatentCache(layers, lengths_B), seen_BX
    (tokens_B, cache, seen_BX), new_NB = jax.lax.scan(next_token, start, first + jnp.arange(steps))
    return new_NB, tokens_B, cache.layers, cache.lengths_B, seen_BX


@functools.partial(_jit, compiler_options=_NO_GRAPHS)
def _kernels_decode(config, weights, tokens_B, layers, lengths_B, done_B, seen_BX, values, key, first, *, plan, steps):
    """Of one row, which is not done."""

    def next_token(carry, step):
        (tokens_B, layers, seen_BX, workspace), (number, cos_sin, length_B) = carry, step
        cache = LatentCache(layers, length_B)
        scores_BX, cache, workspace = fused_decode.step(config, weights, tokens_B, cos_sin, cache, workspace)
        tokens_B, seen_BX = _chosen(plan, values, scores_BX, seen_BX, key, number)
        return (tokens_B, cache.layers, seen_BX, workspace), tokens_B

    coming = jnp.arange(steps)
    start = tokens_B, layers, seen_BX, fused_decode.init_workspace(config, weights, layers)
    each = first + coming, rope_cos_sin(config, lengths_B[0] + coming), lengths_B + coming[:, None]
    (tokens_B, layers, seen_BX, _), new_NB = jax.lax.scan(next_token, start, each, unroll=_UNROLL)
    return new_NB, tokens_B, layers, lengths_B + steps, seen_BX


def _chosen(plan: SamplingPlan, values, scores_BX, seen_BX, key, number) -> tuple[jax.Array, jax.Array | None]:
    """The next token of each row, which is seen then."""
    tokens_B = choose(plan, values, scores_BX, seen_BX, jax.random.fold_in(key, number))
    if seen_BX is not None:
        seen_BX |= jax.nn.one_hot(tokens_B, seen_BX.shape[1], dtype=bool)
    return tokens_B, seen_BX


@dataclasses.dataclass
class Context:
    """What a generator has read, one row a prompt; `Generator.generate` reads on from it and leaves it extended.

    The plan of the memory counts the context of the call alone, and that of `Generator.fork` the original too.
    """

    tokens: list[list[int]]
    """Of each row, those that the cache holds."""
    layers: list[LayerCache]
    """Rows of a mesh's batch beyond `tokens` are unused."""

    @classmethod
    def empty(cls, rows: int) -> "Context":
        """Has read nothing."""
        return cls([[] for _ in range(rows)], [])

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for: in all layers, should growing them have been interrupted."""
        return min((layer.capacity for layer in self.layers), default=0)


class Generator:
    """A model ready to continue prompts, on the default device or the mesh that is set.

    Args:
        config: the model; its `dtype` is that of computations, 16-bit weights and, by default, the cache.
        params: see `transformer.init_params`; from the host they reach the device converted, layer by layer.
        int8_weights: matrices of layers in 8 bits.
        cache_dtype: `int8` for half the cache; None for the model's dtype.
        prefill_chunk: prompt tokens, of all rows together, processed at one time; bounds the memory of activations.
        memory_limit: bytes of a device that may be used; None for what JAX may take, without a limit on CPUs.

    Raises:
        InputError: the weights alone do not fit.
    """

    def __init__(
        self, config: ModelConfig, params: dict, *, int8_weights: bool = False, cache_dtype: str | None = None,
        prefill_chunk: int = PREFILL_CHUNK, memory_limit: int | None = None,
    ):  # fmt: skip
        if prefill_chunk < 1:
            raise InputError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        self.config, self.cache_dtype, self.prefill_chunk = config, cache_dtype, prefill_chunk
        self.memory_limit = available_memory() if memory_limit is None else memory_limit
        self._plan = functools.partial(
            MemoryPlan.of, config, cache_dtype=cache_dtype, int8_weights=int8_weights, prefill_chunk=prefill_chunk
        )
        self._require(rows=1, tokens=1)
        self.weights = decoder.inference_weights(config, params, int8_weights)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_id: int | None = None,
        sampling: Sampling | None = None,
        context: Context | None = None,
        on_tokens: OnTokens | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> list[list[int]]:
        """Continues each prompt; prompts may differ in length.

        Args:
            prompts: token ids.
            max_new_tokens: the most tokens to add to a prompt.
            eos_id: the token that ends a continuation; None never ends one early.
            sampling: how tokens are chosen; None for greedy.
            context: what was read before. Of each prompt, the tokens that its row of the context starts with are not
                read again; the context holds the prompt and the continuation afterwards.
            on_tokens: see OnTokens.
            on_prefill: see OnPrefill.

        Returns:
            The new tokens of each prompt, without eos.

        Raises:
            InputError: an empty prompt, a token outside the vocabulary, a prompt that leaves no room for the new tokens
                in the model or in the device's memory; found before anything is allocated.
        """
        sampling, context = sampling or Sampling(), context or Context.empty(len(prompts))
        prompts = [list(prompt) for prompt in prompts]
        check_prompts(self.config, prompts, max_new_tokens)
        if not prompts:
            return []
        if len(context.tokens) != len(prompts):
            raise InputError(f"the context has {len(context.tokens)} rows, but there are {len(prompts)} prompts")
        # Nothing beyond these is valid any more, should this be interrupted.
        context.tokens = [
            common_prefix(held, prompt[:-1]) for held, prompt in zip(context.tokens, prompts, strict=True)
        ]
        self._make_room(context, len(prompts), max(map(len, prompts)) + max_new_tokens)
        lengths = self._prefill(context, prompts, on_prefill)
        new = self._decode(context, prompts, lengths, max_new_tokens, eos_id, sampling, on_tokens)
        # The last token was never fed.
        context.tokens = [(prompt + row)[:-1] for prompt, row in zip(prompts, new, strict=True)]
        return new

    def fork(self, context: Context, rows: int) -> Context:
        """So many copies of a context with one row: one text, many questions at a time. The original stays as it is.

        Raises:
            InputError: the context has more rows than one, or the copies do not fit.
            UsageError: a mesh of several devices is set.
        """
        if mesh.size() > 1:
            raise UsageError(
                f"contexts are copied on one device, the mesh has {mesh.size()}; read the prompts together"
            )
        if len(context.tokens) != 1:
            raise InputError(f"only a context of one row can be copied, this has {len(context.tokens)}")
        held = sum(x.nbytes for x in jax.tree.leaves(context.layers))
        self._require(rows=rows, tokens=context.capacity, beside=held)
        layers = [resized(layer, rows, context.capacity) for layer in context.layers]
        return Context([list(context.tokens[0]) for _ in range(rows)], layers)

    def _bytes(self, rows: int, tokens: int, growing: bool) -> int:
        """On one device, of which each has all weights; a cache that grows has one layer twice for a moment."""
        plan = self._plan(rows=_padded(rows) // mesh.size(), tokens=tokens)
        return plan.total + (plan.cache // self.config.num_hidden_layers if growing else 0)

    def _fits(self, rows: int, tokens: int, growing: bool = False) -> bool:
        return self.memory_limit is None or self._bytes(rows, tokens, growing) <= self.memory_limit

    def _require(self, rows: int, tokens: int, growing: bool = False, beside: int = 0) -> None:
        """Raises InputError unless weights and a cache for so many tokens a row fit, `beside` bytes on each device."""
        if self.memory_limit is None or self._bytes(rows, tokens, growing) <= self.memory_limit - beside:
            return
        limit, plan = self.memory_limit - beside, self._plan(rows=_padded(rows) // mesh.size(), tokens=tokens)
        longest = most_that_fits(lambda tokens: self._bytes(rows, tokens, growing), limit)
        raise InputError(
            f"{rows} x {tokens:,} tokens need {plan}, but there are {limit / 2**30:.2f} GiB on each of {mesh.size()} "
            "devices; "
            + (f"the longest that fits is {longest:,} tokens a row" if longest else "not even one token fits")
            + "; an 8-bit cache, 8-bit weights or a smaller prefill_chunk take less"
        )

    def _make_room(self, context: Context, prompts: int, tokens: int) -> None:
        """Allocates or grows the cache, one layer after the other."""
        if context.capacity >= tokens:
            return
        rows, growing, exact = _padded(prompts), bool(context.layers), round_up(tokens, GRANULE)
        capacity = min(room_for(tokens), round_up(self.config.max_position_embeddings, GRANULE))
        if not self._fits(rows, capacity, growing=growing):
            self._require(rows=rows, tokens=exact, growing=growing)
            capacity = exact
        if not growing:
            context.layers = [
                _init_layer(self.config, rows, capacity, self.cache_dtype) for _ in range(self.config.num_hidden_layers)
            ]
            return
        for i, layer in enumerate(context.layers):
            if layer.capacity < capacity:
                context.layers[i] = resized(layer, len(layer.c_BSC), capacity)
            del layer  # so that its memory is free before the next grows

    def _prefill(self, context: Context, prompts: list[list[int]], on_prefill: OnPrefill | None) -> np.ndarray:
        """Reads all but the last token of each prompt, with which decoding starts; how many are held then, [B]."""
        rows = len(context.layers[0].c_BSC)
        lengths, end = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        lengths[: len(prompts)] = [len(row) for row in context.tokens]
        end[: len(prompts)] = [len(prompt) - 1 for prompt in prompts]
        total, most = int((end - lengths).sum()), int((end - lengths).max())
        chunk = min(max(self.prefill_chunk // rows // GRANULE * GRANULE, GRANULE), room_for(most))
        while (lengths < end).any():
            valid = np.clip(end - lengths, 0, chunk)
            tokens = np.zeros((rows, chunk), np.int32)
            for row, prompt in enumerate(prompts):
                tokens[row, : valid[row]] = prompt[lengths[row] : lengths[row] + valid[row]]
            h_BTD = decoder.prefill_embed(self.config, self.weights["embed_tokens"], mesh.shard_batch(tokens))
            lengths_B, valid_B = mesh.shard_batch(lengths), mesh.shard_batch(valid)
            for i, weights in enumerate(self.weights["layers"]):
                h_BTD, context.layers[i] = decoder.prefill_layer(
                    self.config, weights, h_BTD, context.layers[i], lengths_B, valid_B, i + 1 == len(context.layers)
                )
            lengths = lengths + valid
            context.tokens = [prompt[: lengths[row]] for row, prompt in enumerate(prompts)]
            if on_prefill:
                jax.block_until_ready(h_BTD)
                on_prefill(total - int((end - lengths).sum()), total)
        return lengths

    def _decode(
        self, context: Context, prompts: list[list[int]], lengths: np.ndarray, max_new_tokens: int, eos_id: int | None,
        sampling: Sampling, on_tokens: OnTokens | None,
    ) -> list[list[int]]:  # fmt: skip
        rows, steps = len(lengths), min(DECODE_BLOCK, max_new_tokens)
        new: list[list[int]] = [[] for _ in prompts]
        done = np.arange(rows) >= len(prompts)
        tokens = np.zeros(rows, np.int32)
        tokens[: len(prompts)] = [prompt[-1] for prompt in prompts]
        tokens_B, lengths_B = mesh.shard_batch(tokens), mesh.shard_batch(lengths)
        seen_BX = (
            mesh.shard_batch(seen_tokens(prompts, rows, self.config.vocab_size)) if sampling.plan.penalty else None
        )
        values, key = knobs(sampling), jax.random.key(sampling.seed)
        blocks, started = -(-max_new_tokens // steps), None
        # The device does not wait for the host: while a block is looked at, the next is under way.
        for block in range(blocks + 1):
            new_NB = started
            if block < blocks:
                started, tokens_B, layers, lengths_B, seen_BX = decode_block(
                    self.config, self.weights, tokens_B, (*context.layers,), lengths_B, mesh.shard_batch(done.copy()),
                    seen_BX, values, key, jnp.int32(block * steps), plan=sampling.plan, steps=steps,
                )  # fmt: skip
                context.layers = list(layers)
            if new_NB is None:
                continue
            fresh_NB = np.asarray(new_NB)
            for row in np.flatnonzero(~done):
                fresh = fresh_NB[: max_new_tokens - len(new[row]), row].tolist()
                if eos_id in fresh:
                    fresh, done[row] = fresh[: fresh.index(eos_id)], True
                new[row] += fresh
                done[row] |= bool(fresh and on_tokens and on_tokens(int(row), fresh)) or len(new[row]) == max_new_tokens
            if done.all():
                break
        return new


def generate(
    config: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    eos_id: int | None = None, sampling: Sampling | None = None, prefill_chunk: int = PREFILL_CHUNK,
) -> list[list[int]]:  # fmt: skip
    """`Generator.generate` once, for weights that are used no more."""
    generator = Generator(config, params, prefill_chunk=prefill_chunk)
    return generator.generate(prompts, max_new_tokens=max_new_tokens, eos_id=eos_id, sampling=sampling)


_init_layer = jax.jit(init_layer, static_argnums=(0, 1, 2, 3))


def _padded(rows: int) -> int:
    return round_up(rows, mesh.size())
