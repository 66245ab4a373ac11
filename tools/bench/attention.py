"""Times causal attention: `python -m tools.bench.attention [--shapes ...] [--json FILE]`.

Forward alone, and forward and backward together, for every implementation that can run here and for the attention of
PyTorch and JAX. Results are compared with float64, all queries and keys of some of the heads.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_attention import IMPLEMENTATIONS, UnavailableError, attention
from mla_jax.errors import UsageError, one_line_errors
from mla_jax.lengths import LENGTH_PATTERN, format_length, parse_length
from tools.bench import ceilings, float64, report
from tools.bench.timing import has_torch_gpu, time_jax, time_torch

DEFAULT_SHAPES = [f"{width}:1x{tokens}" for width in ("128/128x32", "192/128x16") for tokens in ("4k", "32k", "128k")]
CHECKED_HEADS = 2
_MOST_TOKENS = {"xla": 2**15}
"""The longest sequences of implementations that would take minutes beyond."""


class Shape(NamedTuple):
    """Self-attention of whole sequences; queries and keys K wide, values V."""

    qk_width: int
    v_width: int
    heads: int
    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Parses `K/VxHEADS:BATCHxTOKENS`, 192/128x16:1x32k for instance."""
        match = re.fullmatch(rf"(\d+)/(\d+)x(\d+):(\d+)x{LENGTH_PATTERN}", text)
        if match is None:
            raise UsageError(f"shape {text!r} is not K/VxHEADS:BATCHxTOKENS, 192/128x16:1x32k for instance")
        *numbers, tokens = match.groups()
        return cls(*(int(number) for number in numbers), parse_length(tokens))  # pyright: ignore[reportCallIssue]

    def flops(self, backward: bool) -> float:
        """FLOPs of the matrix products, over the half of all pairs of tokens that is causal.

        Forward computes scores (K) and outputs (V). Backward recomputes scores, then the gradients of queries and keys
        (K each) and those of probabilities and values (V each): 2.5 times forward if K = V.
        """
        widths = self.qk_width + self.v_width
        if backward:
            widths += 3 * self.qk_width + 2 * self.v_width
        return 2 * widths * self.batch * self.heads * self.tokens**2 / 2

    def __str__(self) -> str:
        size = f"{self.batch} x {format_length(self.tokens)}"
        return f"qk {self.qk_width}, v {self.v_width}, {self.heads} heads, {size}"


class Problem:
    """The arrays of one shape, bfloat16, and the expected results of some heads."""

    def __init__(self, shape: Shape, seed: int = 0):
        self.shape, self.scale = shape, shape.qk_width**-0.5
        widths = shape.qk_width, shape.qk_width, shape.v_width, shape.v_width
        keys = jax.random.split(jax.random.key(seed), len(widths))
        self.arrays = [
            jax.random.normal(key, (shape.batch, shape.tokens, shape.heads, width), jnp.bfloat16)
            for key, width in zip(keys, widths, strict=True)
        ]
        """Queries, keys, values, and the gradient with respect to the output."""
        rng = np.random.default_rng(seed)
        self.checked = rng.choice(shape.heads, min(CHECKED_HEADS, shape.heads), replace=False).tolist()
        self.expected = [
            float64.attention(*(x[-1, :, head] for x in self.arrays), scale=self.scale) for head in self.checked
        ]

    def error(self, results) -> float:
        """The largest relative error of out, or of out, dq, dk and dv, in the heads that are checked."""
        return max(
            float64.relative_error(result[-1, :, head], expected)
            for head, all_expected in zip(self.checked, self.expected, strict=True)
            for result, expected in zip(results, all_expected, strict=False)
        )


def ours(problem: Problem, implementation: str, backward: bool):
    """(results, timing) of one of our implementations."""
    most = _MOST_TOKENS.get(implementation, problem.shape.tokens)
    if problem.shape.tokens > most:
        raise UnavailableError(f"not run beyond {format_length(most)} tokens, where it is slow")

    def forward(q, k, v):
        return attention(q, k, v, scale=problem.scale, implementation=implementation)

    return _time_jax(problem, forward, backward)


def _time_jax(problem: Problem, forward: Callable, backward: bool):
    def both(q, k, v, d_out):
        out, vjp = jax.vjp(forward, q, k, v)
        return out, *vjp(d_out)

    if backward:
        return time_jax(both, (), [problem.arrays], calls=1)
    return time_jax(lambda *qkv: (forward(*qkv),), (), [problem.arrays[:3]], calls=1)


def pytorch(problem: Problem, backend: str, backward: bool):
    """(results, timing) of PyTorch's scaled dot product attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    *qkv, d_out = (torch.from_dlpack(jax.block_until_ready(x)) for x in problem.arrays)
    q, k, v = (x.detach().requires_grad_(backward) for x in qkv)

    def step():
        q_BHTK, k_BHTK, v_BHTV = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(
                q_BHTK, k_BHTK, v_BHTV, is_causal=True, scale=problem.scale
            )
        out = out.transpose(1, 2)
        return (out, *torch.autograd.grad(out, (q, k, v), d_out)) if backward else (out,)

    return time_torch(step, [()], calls=1)


def jax_mosaic(problem: Problem, backward: bool):
    """(results, timing) of JAX's example of attention in Mosaic GPU: float16 of equal widths, causal forward only."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    if backward or problem.shape.qk_width != problem.shape.v_width:
        raise UnavailableError("it has no causal backward pass" if backward else "it takes equal widths only")
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    q, k, v = (x.astype(jnp.float16) for x in problem.arrays[:3])
    turn = q * problem.scale, k, v
    return time_jax(lambda *qkv: (attention_mgpu.attention(*qkv, config),), (), [turn], calls=1)


def runs(problem: Problem, backward: bool) -> Iterator[tuple[str, bool, Callable]]:
    """Yields (name, is it a peer, function that returns (results, timing)) of all that may run here."""
    for name in IMPLEMENTATIONS["attention"]:
        if name != "reference":
            yield name, False, lambda n=name: ours(problem, n, backward)
    if has_torch_gpu():
        yield "PyTorch cuDNN", True, lambda: pytorch(problem, "CUDNN_ATTENTION", backward)
        yield "PyTorch flash", True, lambda: pytorch(problem, "FLASH_ATTENTION", backward)
    if jax.default_backend() == "gpu":
        yield "JAX's Mosaic example", True, lambda: jax_mosaic(problem, backward)


def bench(problem: Problem, backward: bool, only: list[str], matmul: float) -> list[dict[str, Any]]:
    """The rows of one shape; `matmul` is the measured matmul throughput in FLOP/s."""
    rows = []
    for name, peer, run in runs(problem, backward):
        if only and not any(part in name for part in only):
            continue

        def measure(run=run):
            results, timing = run()
            return timing, problem.error(results), {}

        row = {"shape": str(problem.shape), "backward": backward, **report.measured(name, peer, measure)}
        if row["seconds"]:
            speed = problem.shape.flops(backward) / row["seconds"]
            row |= {"flop_a_second": speed, "of_ceiling": speed / matmul}
        rows.append(row)
    return report.with_ratios(rows)


COLUMNS = {
    "ms": lambda row: f"{row['seconds'] * 1e3:.3f}",
    "spread": lambda row: f"{row['spread']:.1%}",
    "TFLOP/s": lambda row: f"{row['flop_a_second'] / 1e12:.0f}",
    "of matmul peak": lambda row: f"{row['of_ceiling']:.0%}",
    "error": lambda row: f"{row['error']:.1e}",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.attention", description="Times causal attention.")
    parser.add_argument(
        "--shapes", nargs="+", default=DEFAULT_SHAPES, metavar="SHAPE",
        help="192/128x16:1x32k for queries and keys 192 wide, values 128, 16 heads, 1 row of 32k tokens",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run those whose name contains NAME")
    parser.add_argument("--json", type=Path, help="file for the results, rewritten after each shape")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    with one_line_errors():
        shapes = [Shape.parse(text) for text in args.shapes]
        matmul = ceilings.matmul()
        results = {"provenance": report.origin(), "matmul_ceiling": matmul, "rows": []}
        print(f"ceiling: {matmul / 1e12:,.1f} TFLOP/s, matmul of bfloat16\n", flush=True)
        for shape in shapes:
            problem = Problem(shape)
            for backward in (False, True):
                rows = bench(problem, backward, args.only, matmul)
                title = f"{shape}, {'forward and backward' if backward else 'forward'}"
                report.publish(title, COLUMNS, rows, results, args.json)


if __name__ == "__main__":
    main()
