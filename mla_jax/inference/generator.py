"""Generation through the latent cache: prefill in chunks (expanded), decode in a compiled loop (absorbed).

A `Generator` has the weights and knows what fits in memory; a `Session` is what it has read.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import mesh
from mla_jax.config import ModelConfig
from mla_jax.errors import InputError, UsageError
from mla_jax.hardware import GIB, available_memory
from mla_jax.inference.decode_loop import DecodeState, decode_block
from mla_jax.inference.memory import (
    ALIGNMENT,
    MemoryPlan,
    bucketed_capacity,
    most_that_fits,
    round_up,
)
from mla_jax.inference.prompts import check_prompts
from mla_jax.inference.sampling import SamplingParams, seen_tokens
from mla_jax.inference.session import Chunk, OnPrefill, Session, prefill
from mla_jax.model import decoder
from mla_jax.model.cache import init_layer, resize

PREFILL_CHUNK = 8192
"""Prompt tokens, of all rows together, that are processed at one time."""
DECODE_BLOCK = 32
"""Tokens that one call of the compiled loop adds; meanwhile, those of the call before are streamed or stop rows."""

OnTokens = Callable[[int, list[int]], bool | None]
"""Called with the row and its new tokens, a few at a time; True ends the row."""


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
        eos_id: int | Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        session: Session | None = None,
        on_tokens: OnTokens | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> list[list[int]]:
        """Continues each prompt; prompts may differ in length.

        Args:
            prompts: token ids.
            max_new_tokens: the most tokens to add to a prompt.
            eos_id: the token or tokens that end a continuation; None never ends one early.
            sampling: how tokens are chosen; None for greedy.
            session: what was read before. Of each prompt, the tokens that its row of the session starts with are not
                read again; the session holds the prompt and the continuation afterwards.
            on_tokens: see OnTokens.
            on_prefill: see OnPrefill.

        Returns:
            The new tokens of each prompt, without the token that ended it.

        Raises:
            InputError: an empty prompt, a token outside the vocabulary, a prompt that leaves no room for the new tokens
                in the model or in the device's memory; found before anything is allocated.
        """
        sampling, session = sampling or SamplingParams(), session or Session.empty(len(prompts))
        prompts = [list(prompt) for prompt in prompts]
        check_prompts(self.config, prompts, max_new_tokens)
        if not prompts:
            return []
        # Decoding starts with the last token of each prompt.
        capacity = max(map(len, prompts)) + max_new_tokens
        self.read(session, [prompt[:-1] for prompt in prompts], capacity=capacity, on_prefill=on_prefill)
        stops = frozenset() if eos_id is None else frozenset(np.ravel(eos_id).tolist())
        new = self._decode(session, prompts, max_new_tokens, stops, sampling, on_tokens)
        # The last token was never fed.
        session.tokens = [(prompt + row)[:-1] for prompt, row in zip(prompts, new, strict=True)]
        return new

    def read(
        self, session: Session, prompts: Sequence[Sequence[int]], *, capacity: int = 1, other_bytes: int = 0,
        on_prefill: OnPrefill | None = None,
    ) -> None:  # fmt: skip
        """Makes a session hold these prompts, of which it reads what it has not read yet.

        Args:
            session: has a row for each prompt.
            prompts: token ids that the model takes; may be empty.
            capacity: tokens that a row will hold later, if they are more than its prompt.
            other_bytes: see `reserve`.
            on_prefill: see OnPrefill.

        Raises:
            InputError: the session has another number of rows, or the tokens do not fit in the device's memory.
        """
        if len(session.tokens) != len(prompts):
            raise InputError(f"the session has {len(session.tokens)} rows, but there are {len(prompts)} prompts")
        session.keep_common_prefix(prompts)
        self.reserve(session, max([capacity, *map(len, prompts)]), other_bytes)
        total = sum(map(len, prompts)) - sum(map(len, session.tokens))
        for chunk in self._prefill(session, prompts):
            if on_prefill:
                jax.block_until_ready(chunk.h_BTD)
                on_prefill(total - sum(map(len, prompts)) + sum(map(len, session.tokens)), total)

    def hidden_states(self, session: Session, prompts: Sequence[Sequence[int]]) -> Iterator[Chunk]:
        """Reads on as `read` does, and yields the hidden states of the new tokens chunk by chunk.

        The session's tokens must be the beginnings of the prompts, and it must have room for the rest.
        """
        return self._prefill(session, prompts, hidden_states=True)

    def reserve(self, session: Session, tokens: int, other_bytes: int = 0) -> None:
        """Allocates or grows the cache so that each row has room for `tokens`, one layer after the other.

        Args:
            session: what it holds stays.
            tokens: the capacity of a row that is needed; some more is allocated, so that few shapes are compiled.
            other_bytes: bytes on each device that the caller will take besides.

        Raises:
            InputError: it does not fit in the device's memory.
        """
        rows = _padded(len(session.tokens))
        if session.capacity >= tokens:
            if other_bytes:
                self._require(rows=rows, tokens=session.capacity, beside=other_bytes)
            return
        growing, exact = bool(session.layers), round_up(tokens, ALIGNMENT)
        capacity = min(bucketed_capacity(tokens), round_up(self.config.max_position_embeddings, ALIGNMENT))
        if not self._fits(rows, capacity, growing, other_bytes):
            self._require(rows=rows, tokens=exact, growing=growing, beside=other_bytes)
            capacity = exact
        if not growing:
            session.layers = [
                init_layer(self.config, rows, capacity, self.cache_dtype) for _ in range(self.config.num_hidden_layers)
            ]
            return
        for i, layer in enumerate(session.layers):
            if layer.capacity < capacity:
                session.layers[i] = resize(layer, len(layer.c_BSC), capacity)
            del layer  # so that its memory is free before the next grows

    def fork(self, session: Session, rows: int) -> Session:
        """So many copies of a session with one row: one text, many questions at a time. The original stays as it is.

        Raises:
            InputError: the session has more rows than one, or the copies do not fit.
            UsageError: a mesh of several devices is set.
        """
        if mesh.size() > 1:
            raise UsageError(
                f"sessions are copied on one device, the mesh has {mesh.size()}; read the prompts together"
            )
        if len(session.tokens) != 1:
            raise InputError(f"only a session of one row can be copied, this has {len(session.tokens)}")
        self._require(rows=rows, tokens=session.capacity, beside=_cache_bytes(session))
        layers = [resize(layer, rows, session.capacity) for layer in session.layers]
        return Session([list(session.tokens[0]) for _ in range(rows)], layers)

    def most_copies(self, session: Session, wanted: int, other_bytes: int = 0) -> int:
        """Number of copies, up to `wanted`, that `fork` can make beside the session and `other_bytes`."""
        fits = functools.partial(self._fits, tokens=session.capacity, beside=_cache_bytes(session) + other_bytes)
        return next((rows for rows in range(wanted, 0, -1) if fits(rows)), 0)

    def _prefill(self, session: Session, prompts: Sequence[Sequence[int]], hidden_states: bool = False):
        return prefill(self.config, self.weights, session, prompts, self.prefill_chunk, hidden_states=hidden_states)

    def _bytes(self, rows: int, tokens: int, growing: bool) -> int:
        """Bytes on one device, of which each has all weights; a cache that grows has one layer twice for a moment."""
        plan = self._plan(rows=_padded(rows) // mesh.size(), tokens=tokens)
        return plan.total + (plan.cache // self.config.num_hidden_layers if growing else 0)

    def _fits(self, rows: int, tokens: int, growing: bool = False, beside: int = 0) -> bool:
        return self.memory_limit is None or self._bytes(rows, tokens, growing) <= self.memory_limit - beside

    def _require(self, rows: int, tokens: int, growing: bool = False, beside: int = 0) -> None:
        """Raises InputError unless weights and a cache for so many tokens a row fit, `beside` bytes on each device."""
        if self.memory_limit is None or self._fits(rows, tokens, growing, beside):
            return
        limit, plan = self.memory_limit - beside, self._plan(rows=_padded(rows) // mesh.size(), tokens=tokens)
        longest = most_that_fits(lambda tokens: self._bytes(rows, tokens, growing), limit)
        raise InputError(
            f"{rows} x {tokens:,} tokens need {plan}, but there are {limit / GIB:.2f} GiB on each of {mesh.size()} "
            "devices; "
            + (f"the longest that fits is {longest:,} tokens a row" if longest else "not even one token fits")
            + "; an 8-bit cache, 8-bit weights or a smaller prefill_chunk take less"
        )

    def _decode(
        self, session: Session, prompts: list[list[int]], max_new_tokens: int, stops: frozenset[int],
        sampling: SamplingParams, on_tokens: OnTokens | None,
    ) -> list[list[int]]:  # fmt: skip
        rows, steps = len(session.layers[0].c_BSC), min(DECODE_BLOCK, max_new_tokens)
        new: list[list[int]] = [[] for _ in prompts]
        done = np.arange(rows) >= len(prompts)
        state = self._start(session, prompts, rows, sampling)
        params, key = sampling.arrays(), jax.random.key(sampling.seed)
        blocks, started = -(-max_new_tokens // steps), None
        # The device does not wait for the host: while a block is looked at, the next is under way.
        for block in range(blocks + 1):
            new_NB = started
            if block < blocks:
                started, state = decode_block(
                    self.config, self.weights, state, mesh.shard_batch(done.copy()), params, key,
                    jnp.int32(block * steps), plan=sampling.plan, steps=steps,
                )  # fmt: skip
                session.layers = list(state.layers)
            if new_NB is None:
                continue
            fresh_NB = np.asarray(new_NB)
            for row in np.flatnonzero(~done):
                fresh = fresh_NB[: max_new_tokens - len(new[row]), row].tolist()
                if not stops.isdisjoint(fresh):
                    fresh, done[row] = list(itertools.takewhile(lambda token: token not in stops, fresh)), True
                new[row] += fresh
                done[row] |= bool(fresh and on_tokens and on_tokens(int(row), fresh)) or len(new[row]) == max_new_tokens
            if done.all():
                break
        return new

    def _start(self, session: Session, prompts: list[list[int]], rows: int, sampling: SamplingParams) -> DecodeState:
        """Decoding from the last token of each prompt; rows beyond the prompts are empty."""
        tokens, lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        tokens[: len(prompts)] = [prompt[-1] for prompt in prompts]
        lengths[: len(prompts)] = [len(row) for row in session.tokens]
        seen = seen_tokens(prompts, rows, self.config.vocab_size) if sampling.plan.penalty else None
        return DecodeState(
            mesh.shard_batch(tokens), tuple(session.layers), mesh.shard_batch(lengths),
            None if seen is None else mesh.shard_batch(seen),
        )  # fmt: skip


def generate(
    config: ModelConfig, params: dict, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    eos_id: int | Sequence[int] | None = None, sampling: SamplingParams | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> list[list[int]]:  # fmt: skip
    """Calls `Generator.generate` once, for weights that are not used again."""
    generator = Generator(config, params, prefill_chunk=prefill_chunk)
    return generator.generate(prompts, max_new_tokens=max_new_tokens, eos_id=eos_id, sampling=sampling)


def _padded(rows: int) -> int:
    return round_up(rows, mesh.size())


def _cache_bytes(session: Session) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(session.layers))
