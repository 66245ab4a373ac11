"""Sampling the next token from logits. Names, meanings and order are those of transformers' generation."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Values that control the choice of tokens; greedy by default.

    Raises:
        InputError: a value out of its range, or a filter without a temperature.
    """

    temperature: float = 0.0
    """0 for the most likely token, else samples from softmax(logits / temperature)."""
    top_k: int = 0
    """Only so many of the most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens whose probabilities add up to this (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the most likely one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt or generated, multiplies negative ones (arXiv 1909.05858)."""
    seed: int = 0

    def __post_init__(self):
        for name, fits, expected in (
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "0 (greedy) or above"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all) or above, below 2^31"),
            ("seed", 0 <= self.seed < 2**63, "0 or above, below 2^63"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
        ):
            if not fits:
                raise InputError(f"{name} must be {expected}, got {getattr(self, name)}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise InputError("top_k, top_p and min_p choose among samples; set a temperature above 0, 1.0 for instance")

    @property
    def plan(self) -> "SamplingPlan":
        """The static part, see `SamplingPlan`."""
        greedy = self.temperature == 0
        filters = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return SamplingPlan(greedy, filters, self.repetition_penalty != 1)

    def arrays(self) -> dict[str, jax.Array]:
        """The values as `sample` takes them: arrays, so that other values need no other compiled function."""
        floats = ("temperature", "top_p", "min_p", "repetition_penalty")
        return {name: jnp.float32(getattr(self, name)) for name in floats} | {"top_k": jnp.int32(self.top_k)}


class SamplingPlan(NamedTuple):
    """The static part of `SamplingParams`: one compiled loop serves all values with the same plan."""

    greedy: bool
    filters: bool
    penalty: bool


def sample(
    plan: SamplingPlan, params: dict[str, jax.Array], logits_BX: jax.Array, seen_BX: jax.Array | None, key: jax.Array
) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
        plan: see `SamplingParams.plan`.
        params: see `SamplingParams.arrays`.
        logits_BX: float32.
        seen_BX: bool, the tokens that occur in each row; needed for the repetition penalty.
        key: of the random draw.
    """
    if plan.penalty:
        assert seen_BX is not None
        penalty = params["repetition_penalty"]
        logits_BX = jnp.where(seen_BX, jnp.where(logits_BX > 0, logits_BX / penalty, logits_BX * penalty), logits_BX)
    if plan.greedy:
        return jnp.argmax(logits_BX, axis=-1).astype(jnp.int32)
    logits_BX /= params["temperature"]
    if plan.filters:
        logits_BX = jnp.where(logits_BX >= _threshold_B1(params, logits_BX), logits_BX, -jnp.inf)
    return jax.random.categorical(key, logits_BX).astype(jnp.int32)


def _threshold_B1(params: dict[str, jax.Array], logits_BX: jax.Array) -> jax.Array:
    """The lowest logit that top-k, then top-p of what is left, then min-p let pass; ties pass together."""
    ordered_BX = jnp.sort(logits_BX, axis=-1, descending=True)
    vocabulary = ordered_BX.shape[-1]
    k = jnp.where(params["top_k"] > 0, jnp.minimum(params["top_k"], vocabulary), vocabulary)
    within_BX = ordered_BX >= jax.lax.dynamic_slice_in_dim(ordered_BX, k - 1, 1, axis=-1)
    p_BX = jax.nn.softmax(jnp.where(within_BX, ordered_BX, -jnp.inf), axis=-1)
    within_BX &= (jnp.cumsum(p_BX, axis=-1) - p_BX < params["top_p"]) & (p_BX >= params["min_p"] * p_BX[:, :1])
    return jnp.min(jnp.where(within_BX, ordered_BX, jnp.inf), axis=-1, keepdims=True)


def seen_tokens(prompts: list[list[int]], rows: int, vocabulary: int) -> np.ndarray:
    """The tokens that occur in each prompt, bool [rows, X]; rows beyond the prompts have none."""
    seen_BX = np.zeros((rows, vocabulary), bool)
    for row, prompt in enumerate(prompts):
        seen_BX[row, prompt] = True
    return seen_BX
