"""Prints the longest context that fits into the memory of a GPU.

`python -m tools.plan_memory [model=NAME] [gpu=NAME|GIB] [rows=N] [model.KEY=VALUE ...]`
"""

import argparse

import jax.numpy as jnp

from experiments.entry import compose_config
from mla_jax.config import ModelConfig
from mla_jax.errors import UsageError, one_line_errors
from mla_jax.hardware import GIB, GPU_MEMORY_GIB, RESERVED_BYTES
from mla_jax.inference.generator import PREFILL_CHUNK
from mla_jax.inference.memory import MemoryPlan, most_that_fits

MODES = {"{0} / {0}": (False, None), "{0} / 8": (False, "int8"), "8 / 8": (True, "int8")}
"""Bits of weights / cache, {0} being those of the model's dtype: (int8_weights, cache_dtype) of a Generator."""


def longest_context(config: ModelConfig, limit: int, rows: int, chunk: int, int8: bool, cache_dtype: str | None) -> int:
    """The most tokens of a row, prompt and answer together, that fit and that the model takes."""

    def total(tokens: int) -> int:
        return MemoryPlan.of(
            config, rows=rows, tokens=tokens, cache_dtype=cache_dtype, int8_weights=int8, prefill_chunk=chunk
        ).total

    longest = config.max_position_embeddings
    return longest if total(longest) <= limit else most_that_fits(total, limit)


def _gib(gpu: str) -> float:
    try:
        return GPU_MEMORY_GIB[gpu] if gpu in GPU_MEMORY_GIB else float(gpu)
    except ValueError:
        raise UsageError(f"gpu={gpu} is unknown; known: {', '.join(GPU_MEMORY_GIB)}, or a number of GiB") from None


def _split(pairs: list[str]) -> tuple[dict[str, str], list[str]]:
    """The values of this tool's own keys, and the overrides of the config."""
    own, overrides = {}, []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key in ("gpu", "rows", "prefill_chunk") and equals:
            own[key] = value
        else:
            overrides.append(pair)
    return own, overrides


def _number(own: dict[str, str], key: str, default: int) -> int:
    text = own.get(key, str(default))
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{key} must be a whole number of at least 1, got {text!r}")
    return int(text)


def report(config: ModelConfig, gpus: dict[str, float], rows: int, chunk: int) -> str:
    """A line for each GPU and mode, as Markdown."""
    lines = [
        "| GPU | GiB | bits of weights / cache | weights | workspace | cache of 1,024 tokens | longest context "
        "| total | sequences that fit |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    bits = 8 * jnp.dtype(config.dtype).itemsize
    for gpu, gib in gpus.items():
        limit = round(gib * GIB) - RESERVED_BYTES
        for mode, (int8, dtype) in MODES.items():
            tokens = longest_context(config, limit, rows, chunk, int8, dtype)

            def planned(rows: int, tokens: int = max(tokens, 1024), int8: bool = int8, dtype: str | None = dtype):
                return MemoryPlan.of(
                    config, rows=rows, tokens=tokens, cache_dtype=dtype, int8_weights=int8, prefill_chunk=chunk
                )

            plan, together = planned(rows), most_that_fits(lambda n: planned(n).total, limit, step=1)
            per_1024 = plan.cache / rows / max(tokens, 1024) * 1024
            lines.append(
                f"| {gpu} | {gib:g} | {mode.format(bits)} | {plan.weights / GIB:.2f} GiB "
                f"| {plan.workspace / GIB:.2f} GiB | {per_1024 / 2**20:.2f} MiB "
                f"| {tokens:,} | {plan.total / GIB:.2f} GiB "
                f"| {together} |"
            )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan_memory", description="Weights, cache, workspace and the longest context that fits."
    )
    parser.add_argument(
        "pairs", nargs="*", metavar="KEY=VALUE",
        help="model=NAME (default: infinite_1b), model.KEY=VALUE, gpu=NAME or GiB (default: all that are known), "
        "rows=N sequences at a time (1), prefill_chunk=N tokens",
    )  # fmt: skip
    with one_line_errors():
        own, overrides = _split(parser.parse_args().pairs)
        if not any(pair.startswith("model=") for pair in overrides):
            overrides.insert(0, "model=infinite_1b")
        config = compose_config(overrides).model
        rows, chunk = _number(own, "rows", 1), _number(own, "prefill_chunk", PREFILL_CHUNK)
        gpus = {own["gpu"]: _gib(own["gpu"])} if "gpu" in own else dict(GPU_MEMORY_GIB)
        print(report(config, gpus, rows, chunk))
        print(
            f"\n{rows} sequence{'s' * (rows > 1)} of at most {config.max_position_embeddings:,} tokens (the model's "
            f"limit), prompt and answer together.\n{RESERVED_BYTES / GIB:.1f} GiB of each GPU are left to the CUDA "
            "context and libraries; JAX must be allowed to take\nthe rest: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (its "
            "default is 0.75)."
        )


if __name__ == "__main__":
    main()
