"""What a serving pod must be told, computed from the model: how long it drains, how much it queues, what fits its GPU.

Contexts of a million tokens make the usual constants wrong. A request may be read for minutes, so a pod that is
replaced must be given minutes to end; and requests differ in length by a thousand times, so a queue is counted in
tokens.
"""

import dataclasses

from mla_jax.config import ModelConfig
from mla_jax.errors import UsageError
from mla_jax.hardware import GIB, GPU_MEMORY_GIB, NOMINAL_PEAK, RESERVED_BYTES
from mla_jax.inference.generator import PREFILL_CHUNK
from mla_jax.inference.memory import MemoryPlan
from mla_jax.model.cache import bytes_per_token
from mla_jax.observability.flops import forward_flops

SERVING_GPUS = {
    "h200": ("NVIDIA H200", 4.8e12),
    "h100": ("NVIDIA H100 80GB HBM3", 3.35e12),
    "a100_80gb": ("NVIDIA A100-SXM4-80GB", 2.04e12),
    "l40s": ("NVIDIA L40S", 0.86e12),
    "l4": ("NVIDIA L4", 0.30e12),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 1.01e12),
    "rtx3090": ("NVIDIA GeForce RTX 3090", 0.94e12),
}
"""Short name: (JAX's `device_kind`, bytes of memory read a second by NVIDIA's data sheet)."""
PREFILL_SHARE = 0.5
"""Share of the nominal peak that prefill reaches. docs/benchmarks.md has measured 55 % from 128k to 1M tokens."""
READ_SHARE = 0.5
"""Share of the nominal bandwidth that decoding reaches; measured were 76 % at 128k tokens."""
UTILIZATION = 0.9
"""vLLM's --gpu-memory-utilization."""
PRE_STOP = 15
"""Seconds in which gateways and proxies hear that a pod is going, before it stops taking requests."""
MARGIN = 15
"""Seconds for the server to end after its last request."""
QUEUED_PROMPTS = 2
"""Prompts of the greatest length that a pod queues before it answers 503; as many times its target if that is more."""
TARGET_SECONDS = 60
"""Seconds of reading that a pod may have before it, on average, before another pod is started."""


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """Times in seconds, lengths in tokens."""

    max_model_len: int
    cache_tokens: int
    """Tokens that the cache of one GPU holds."""
    longest_prefill: float
    """Time to read one prompt of `max_model_len` tokens, alone."""
    longest_answer: float
    """Time to write `answer_tokens` while the whole memory is read for every token."""
    max_num_queued_tokens: int
    """vLLM answers 503 above it."""
    shutdown_timeout: int
    """Time for what was queued at most, the prompt that was let in last, and its answer."""
    termination_grace_period: int
    queued_tokens_target: int
    """Tokens that are read in TARGET_SECONDS where prompts are longest: the autoscaler's target for the average pod."""

    @classmethod
    def of(cls, config: ModelConfig, gpu: str, max_model_len: int, answer_tokens: int) -> "ServingPlan":
        """The plan for one GPU.

        Args:
            config: the model.
            gpu: a name in SERVING_GPUS.
            max_model_len: prompt and answer together.
            answer_tokens: the longest answer.

        Raises:
            UsageError: an unknown GPU, lengths the model does not take, or a cache that one such request overflows.
        """
        if gpu not in SERVING_GPUS:
            raise UsageError(f"gpu={gpu} is unknown; known: {', '.join(SERVING_GPUS)}")
        if not 0 < answer_tokens < max_model_len <= config.max_position_embeddings:
            raise UsageError(
                f"got answer_tokens={answer_tokens:,} and max_model_len={max_model_len:,}, expected 0 < answer_tokens "
                f"< max_model_len <= {config.max_position_embeddings:,} (the model's limit)"
            )
        device, bandwidth = SERVING_GPUS[gpu]
        memory = round(GPU_MEMORY_GIB[gpu] * GIB * UTILIZATION) - RESERVED_BYTES
        cache_tokens = _cache_tokens(config, memory)
        if cache_tokens < max_model_len:
            raise UsageError(
                f"max_model_len={max_model_len:,} does not fit gpu={gpu}: beside the weights its cache holds "
                f"{max(cache_tokens, 0):,} tokens; ask for fewer, or for a larger GPU"
            )

        def prefill(tokens: int) -> float:
            return forward_flops(config, 1, tokens, logits=1) / (PREFILL_SHARE * NOMINAL_PEAK[device])

        longest = prefill(max_model_len)
        target = _longest_within(prefill, TARGET_SECONDS, max_model_len)
        if longest < TARGET_SECONDS:
            target = round(max_model_len * TARGET_SECONDS / longest)
        queue = QUEUED_PROMPTS * max(max_model_len, target)
        answer = answer_tokens * memory / (READ_SHARE * bandwidth)
        drain = round((queue / max_model_len + 1) * longest + answer)
        return cls(
            max_model_len=max_model_len,
            cache_tokens=cache_tokens,
            longest_prefill=longest,
            longest_answer=answer,
            max_num_queued_tokens=queue,
            shutdown_timeout=drain,
            termination_grace_period=PRE_STOP + drain + MARGIN,
            queued_tokens_target=target,
        )


def _cache_tokens(config: ModelConfig, memory: int) -> int:
    plan = MemoryPlan.of(config, rows=1, tokens=1, cache_dtype=None, int8_weights=False, prefill_chunk=PREFILL_CHUNK)
    chunk = MemoryPlan.of(
        config, rows=1, tokens=PREFILL_CHUNK, cache_dtype=None, int8_weights=False, prefill_chunk=PREFILL_CHUNK
    )
    return (memory - plan.weights - chunk.workspace) // bytes_per_token(config, None)


def _longest_within(seconds_of, limit: float, longest: int) -> int:
    """The largest multiple of 1,024 tokens up to `longest` that takes no more than `limit` seconds; 1,024 at least."""
    few, many = 1, max(longest // 1024, 1)
    while few < many:
        middle = (few + many + 1) // 2
        few, many = (middle, many) if seconds_of(middle * 1024) <= limit else (few, middle - 1)
    return 1024 * few
