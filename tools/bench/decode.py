"""Times decode over a latent cache: `python -m tools.bench.decode [--shapes ...] [--peers FOLDER] [--json FILE]`.

Every implementation that can run here and every peer gets the same values in a paged cache, pages in random order (the
einsum baselines get them contiguous, which is best for them), and each result is compared with float64.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_attention import IMPLEMENTATIONS, UnavailableError, decode, quantize_cache
from latent_attention.call_shapes import DecodeShape
from latent_attention.decode import mosaic
from latent_attention.gpu import local_gpu
from mla_jax.errors import UsageError, one_line_errors
from mla_jax.lengths import LENGTH_PATTERN, format_length, parse_length
from tools.bench import ceilings, float64, peers, report
from tools.bench.timing import has_torch_gpu, time_jax, time_torch, turns_for

DEFAULT_SHAPES = [
    f"{width}:{size}"
    for width in ("256+64x32", "512+64x16", "512+64x128")
    for size in ("1x8k", "1x128k", "1x1M", "32x8k", "128x8k")
]
_SCALE_BYTES = 8  # of a token in the 8-bit cache: two of float32


class Shape(NamedTuple):
    """One decode step of one layer: one query token a row, all rows of the same length."""

    c_width: int
    rope_width: int
    heads: int
    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Parses `WIDTH+ROPExHEADS:BATCHxTOKENS`, 256+64x32:1x128k for instance."""
        match = re.fullmatch(rf"(\d+)\+(\d+)x(\d+):(\d+)x{LENGTH_PATTERN}", text)
        if match is None:
            raise UsageError(f"shape {text!r} is not WIDTH+ROPExHEADS:BATCHxTOKENS, 256+64x32:1x128k for instance")
        *numbers, tokens = match.groups()
        return cls(*(int(number) for number in numbers), parse_length(tokens))  # pyright: ignore[reportCallIssue]

    def cache_bytes(self, cache: str) -> int:
        """Bytes that a step must read: the cache, once."""
        width = self.c_width + self.rope_width
        return self.batch * self.tokens * (width + _SCALE_BYTES if cache == "int8" else 2 * width)

    def flops(self) -> int:
        """FLOPs of the products with keys and with values."""
        return 2 * self.batch * self.tokens * self.heads * (2 * self.c_width + self.rope_width)

    def __str__(self) -> str:
        size = f"{self.batch} x {format_length(self.tokens)}"
        return f"{self.c_width}+{self.rope_width}, {self.heads} heads, {size}"


class Problem:
    """The arrays of one shape: a pool of pages with as many copies of the cache as take turns."""

    def __init__(self, shape: Shape, page_size: int, seed: int = 0):
        self.shape, self.scale = shape, (shape.c_width + shape.rope_width) ** -0.5
        page_size = page_size or shape.tokens
        if shape.tokens % page_size:
            raise UsageError(f"{shape.tokens} tokens are no whole pages of {page_size}; choose another --page-size")
        per_row = shape.tokens // page_size
        turns = turns_for(shape.cache_bytes("int8"))  # the smallest cache takes the most
        q_key, c_key, k_key, order_key = jax.random.split(jax.random.key(seed), 4)

        def normal(key, *sizes):
            return jax.random.normal(key, sizes, jnp.bfloat16)

        pages = turns * shape.batch * per_row
        self.q_BTHW = normal(q_key, shape.batch, 1, shape.heads, shape.c_width + shape.rope_width)
        self.c_PSC = normal(c_key, pages, page_size, shape.c_width)
        self.k_rope_PSR = normal(k_key, pages, page_size, shape.rope_width)
        self.lengths_B = jnp.full(shape.batch, shape.tokens, jnp.int32)
        order = jax.random.permutation(order_key, pages).astype(jnp.int32)
        self.tables_BN = list(order.reshape(turns, shape.batch, per_row))

    def expected(self, c_PSC: jax.Array, k_rope_PSR: jax.Array, scales_P2S: jax.Array | None = None) -> np.ndarray:
        """The result in float64, of the first turn."""
        return float64.decode(
            self.q_BTHW, c_PSC, k_rope_PSR, self.tables_BN[0], scale=self.scale, scales_P2S=scales_P2S
        )

    def turns(self, cache_dtype) -> list[jax.Array]:
        """The block tables, one for each copy of a cache of this type that takes turns."""
        return self.tables_BN[: turns_for(self.shape.cache_bytes(jnp.dtype(cache_dtype).name))]

    def contiguous(self) -> list[tuple[jax.Array, jax.Array]]:
        """(c_BSC, k_rope_BSR) of each turn."""
        batch, tokens = self.shape.batch, self.shape.tokens
        return [
            (self.c_PSC[table].reshape(batch, tokens, -1), self.k_rope_PSR[table].reshape(batch, tokens, -1))
            for table in self.turns(self.c_PSC.dtype)
        ]


class Run(NamedTuple):
    """One implementation or peer that can be timed."""

    name: str
    peer: bool
    cache: str
    measure: Callable[[], tuple]
    """Returns (result, timing), and the splits if they were chosen."""


def ours(problem: Problem, op: Callable[..., tuple], cache, scales_P2S=None):
    """(out, timing) of `decode` with one of our implementations through JAX."""

    def step(q, c, k_rope, lengths, scales, table):
        return op(q, c, k_rope, lengths, scale=problem.scale, block_table_BN=table, scales_P2S=scales)

    arrays = problem.q_BTHW, *cache, problem.lengths_B, scales_P2S
    (out, _), timing = time_jax(step, arrays, [(table,) for table in problem.turns(cache[0].dtype)])
    return out, timing


def ours_with_rows_on_m(problem: Problem, cache):
    """(out, timing) of `mosaic` in its layout for many heads, which it does not choose by itself."""
    shape, gpu = DecodeShape.of(problem.q_BTHW, cache[0], cache[1], problem.tables_BN[0]), local_gpu()
    reason = mosaic.why_not_rows_on_m(shape, gpu)
    if gpu is None or reason:
        raise UnavailableError(reason)
    return ours(problem, partial(mosaic.decode, config=mosaic.configure_rows_on_m(shape, gpu)), cache)


def ours_in_torch(problem: Problem, cache, scales_P2S=None):
    """(out, timing) of our Triton kernel through PyTorch."""
    from latent_attention.decode.triton_torch import decode

    q, c, k_rope, lengths = (_torch(x) for x in (problem.q_BTHW, *cache, problem.lengths_B))
    scales = None if scales_P2S is None else _torch(scales_P2S)

    def step(table):
        return decode(q, c, k_rope, lengths, scale=problem.scale, block_table=table, scales=scales)

    (out, _), timing = time_torch(step, [(_torch(table),) for table in problem.turns(cache[0].dtype)])
    return out, timing


def xla_einsums(problem: Problem):
    """(out, timing) of three einsums and a softmax."""

    def step(q, c, k_rope):
        content, rope = q[..., : c.shape[-1]], q[..., c.shape[-1] :]
        scores = jnp.einsum("bthc,bsc->bths", content, c, preferred_element_type=jnp.float32)
        scores += jnp.einsum("bthr,bsr->bths", rope, k_rope, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * problem.scale, axis=-1).astype(q.dtype)
        return jnp.einsum("bths,bsc->bthc", weights, c)

    return time_jax(step, (problem.q_BTHW,), problem.contiguous())


def torch_eager(problem: Problem):
    """(out, timing) of the attention that transformers calls eager, on latents."""
    import torch

    q_BHW, width = _torch(problem.q_BTHW)[:, 0], problem.shape.c_width

    def step(kv_BSW):
        weights = torch.softmax(q_BHW @ kv_BSW.mT * problem.scale, dim=-1, dtype=torch.float32).to(q_BHW.dtype)
        return weights @ kv_BSW[..., :width]

    return time_torch(step, [(_torch(jnp.concatenate(parts, axis=-1)),) for parts in problem.contiguous()])


def peer(problem: Problem, name: str, folder: Path | None):
    """(out, timing, splits or None) of a kernel of another project."""
    shape = problem.shape
    module = peers.load(name, folder, shape.c_width)
    kv_PSW = _torch(jnp.concatenate([problem.c_PSC, problem.k_rope_PSR], axis=-1))
    arrays = _torch(problem.q_BTHW), kv_PSW, _torch(problem.lengths_B)
    turns = [(_torch(table),) for table in problem.turns(problem.c_PSC.dtype)]
    options = {"c_width": shape.c_width, "scale": problem.scale}
    if name in peers.SCHEDULED:
        return *time_torch(peers.SCHEDULED[name](module, *arrays, **options), turns), None
    step, others = peers.SPLIT[name]
    return peers.best_splits(
        lambda splits: step(module, *arrays, **options, splits=splits), turns,
        peers.likely_splits(shape.batch, shape.heads), others,
    )  # fmt: skip


def _torch(x: jax.Array):
    import torch

    return torch.from_dlpack(jax.block_until_ready(x))


def runs(problem: Problem, int8: tuple[jax.Array, ...], folder: Path | None) -> Iterator[Run]:
    """Yields all that may run here."""
    caches = {"bfloat16": ((problem.c_PSC, problem.k_rope_PSR), None), "int8": (int8[:2], int8[2])}
    for cache, arrays in caches.items():
        label = "" if cache == "bfloat16" else " int8"
        for name in IMPLEMENTATIONS["decode"]:
            if name != "reference":
                yield Run(
                    f"{name}{label}",
                    False,
                    cache,
                    lambda n=name, a=arrays: ours(problem, partial(decode, implementation=n), *a),
                )
        if has_torch_gpu():
            yield Run(f"triton in PyTorch{label}", False, cache, lambda a=arrays: ours_in_torch(problem, *a))
    yield Run("mosaic, rows on M", False, "bfloat16", lambda: ours_with_rows_on_m(problem, caches["bfloat16"][0]))
    if has_torch_gpu():
        for name in peers.FILES:
            yield Run(name, True, "bfloat16", lambda n=name: peer(problem, n, folder))
        yield Run("PyTorch eager", True, "bfloat16", lambda: torch_eager(problem))
    yield Run("XLA einsums", True, "bfloat16", lambda: xla_einsums(problem))


def bench(shape: Shape, page_size: int, folder: Path | None, only: list[str], read: float) -> list[dict[str, Any]]:
    """The rows of one shape; `read` is the measured read bandwidth in bytes/s."""
    problem = Problem(shape, page_size)
    int8 = jax.jit(quantize_cache)(problem.c_PSC, problem.k_rope_PSR)
    expected = problem.expected(problem.c_PSC, problem.k_rope_PSR)
    expected_of = {"bfloat16": expected, "int8": problem.expected(*int8)}
    rows = []
    for run in runs(problem, int8, folder):
        if only and not any(part in run.name for part in only):
            continue

        def measure(run=run):
            out, timing, *splits = run.measure()
            more = {"cache": run.cache, "error_to_16_bits": float64.relative_error(out, expected)}
            more |= {"splits": splits[0]} if splits else {}
            return timing, float64.relative_error(out, expected_of[run.cache]), more

        row = {"shape": str(shape), **report.measured(run.name, run.peer, measure)}
        if row["seconds"]:
            size = shape.cache_bytes(run.cache)
            row |= {"bytes": size, "bytes_a_second": size / row["seconds"], "of_ceiling": size / row["seconds"] / read}
            row |= {"flop_a_second": shape.flops() / row["seconds"]}
        rows.append(row)
    return report.with_ratios(rows)


COLUMNS = {
    "us": lambda row: f"{row['seconds'] * 1e6:.1f}",
    "spread": lambda row: f"{row['spread']:.1%}",
    "GB/s": lambda row: f"{row['bytes_a_second'] / 1e9:,.0f}",
    "of read bandwidth": lambda row: f"{row['of_ceiling']:.0%}",
    "TFLOP/s": lambda row: f"{row['flop_a_second'] / 1e12:.0f}",
    "error": lambda row: f"{row['error']:.1e}",
    "to 16 bits": lambda row: f"{row['error_to_16_bits']:.1e}",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.decode", description="Times decode and its peers.")
    parser.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, metavar="SHAPE",
                        help="256+64x32:1x128k for 256 + 64 wide, 32 heads, 1 row of 128k tokens")  # fmt: skip
    parser.add_argument("--page-size", type=int, default=64, help="tokens a page, 0 for one page a row (default: 64)")
    parser.add_argument("--peers", type=Path, help="folder with their files (tools/bench/peers.py)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run those whose name contains NAME")
    parser.add_argument("--json", type=Path, help="file for the results, rewritten after each shape")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    with one_line_errors():
        shapes = [Shape.parse(text) for text in args.shapes]
        read, copy = ceilings.read_and_copy()
        results = {
            "provenance": report.origin(),
            "page_size": args.page_size,
            "read_ceiling": read,
            "copy_ceiling": copy,
            "rows": [],
        }
        print(f"ceilings: {read / 1e9:,.0f} GB/s reading, {copy / 1e9:,.0f} GB/s copying\n", flush=True)
        for shape in shapes:
            rows = bench(shape, args.page_size, args.peers, args.only, read)
            report.publish(str(shape), COLUMNS, rows, results, args.json)


if __name__ == "__main__":
    main()
