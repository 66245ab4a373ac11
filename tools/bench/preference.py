"""Times a DPO step whose two answers share one pass over the prompt against one that reads the prompt twice.

`python -m tools.bench.preference [KEY=VALUE ...] [--shapes ...] [--keep ...] [--out FILE]` computes loss and gradients
(no optimizer) of random tokens on one device, three ways: *one pass*, a row [prompt | chosen | rejected] of branches
(mla_jax/model/branches.py); *two passes at once*, ordinary rows [prompt, answer] in one batch, as is usual; *two passes
in turn*, which take the memory of one. The last are given the derivative of the loss by both log-probs, for which a
step would need two more forward passes: their time is a lower bound. In all of them only answers get logits.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.entry import compose_config
from mla_jax.config import MeshConfig, ModelConfig
from mla_jax.errors import UsageError, one_line_errors
from mla_jax.files import write_json
from mla_jax.hardware import nominal_peak
from mla_jax.losses.branch_log_probs import branch_log_probs, token_statistics
from mla_jax.mesh import make_mesh
from mla_jax.model.branches import branch_region
from mla_jax.model.transformer import Transformer, bind, init_params
from mla_jax.observability.flops import train_flops
from tools.bench import report
from tools.bench.steps import Shape, time_steps
from tools.bench.train import keeping

ONE, AT_ONCE, IN_TURN = "one pass", "two passes at once", "two passes in turn"
BETA = 0.1


class Batch(NamedTuple):
    """Pairs of random tokens, in both forms."""

    branches: dict[str, np.ndarray]
    """Arrays [b, P + 2 L], as `branch_log_probs` takes them."""
    ordinary: dict[str, np.ndarray]
    """`tokens` and `targets` [2, b, P + L]: the prompt with the chosen and with the rejected answer."""


def random_pairs(model: ModelConfig, shape: Shape, answer: int) -> Batch:
    """A pair a row: two answers of so many tokens to a prompt that fills the rest.

    Raises:
        UsageError: no room for a prompt.
    """
    b, prompt = shape.batch, shape.tokens - 2 * answer  # tokens of the prompt but for its last, where answers begin
    if answer < 1 or prompt < 1:
        raise UsageError(f"{shape} leaves no room for a prompt and two answers of {answer} tokens; lower --answer")
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.vocab_size, (b, prompt + 1), np.int32)
    answers = rng.integers(0, model.vocab_size, (2, b, answer), np.int32)
    whole = np.concatenate([np.broadcast_to(prompts, (2, *prompts.shape)), answers], axis=2)
    tokens, targets = whole[..., :-1], whole[..., 1:]

    def join(of_prompt: Any, of_answers: np.ndarray) -> np.ndarray:
        """[b, P] and [2, b, L] to a row of two regions."""
        return np.concatenate([np.broadcast_to(of_prompt, (b, prompt)), *of_answers], axis=1).astype(np.int32)

    ones, numbers = np.ones((2, b, answer)), np.broadcast_to([[[1]], [[2]]], (2, b, answer))
    branches = {
        "tokens": join(tokens[0, :, :prompt], tokens[..., prompt:]),
        "targets": join(0, targets[..., prompt:]),
        "positions": join(np.arange(prompt), ones * np.arange(prompt, prompt + answer)),
        "prompts": join(1, ones),
        "branches": join(0, numbers),
    }
    return Batch(branches, {"tokens": tokens, "targets": targets})


def sigmoid_loss(log_probs_2b: jax.Array) -> jax.Array:
    """DPO's loss (arXiv 2305.18290, equation 7) with a reference that finds both answers equally likely."""
    return -jnp.mean(jax.nn.log_sigmoid(BETA * (log_probs_2b[0] - log_probs_2b[1])))


def with_branches(transformer: Transformer, rows: dict, answer: int, chunk: int) -> jax.Array:
    """Log-probs [2, b] of both answers, by one pass."""
    found_bR = branch_log_probs(transformer, rows, 2 * answer, packed=False, chunk=chunk).log_probs_BR
    return found_bR.reshape(-1, 2, answer).sum(2).T


def ordinary(transformer: Transformer, rows: dict, answer: int, chunk: int) -> jax.Array:
    """Log-probs [n] of the answers at the ends of rows [n, P + L]."""
    h_BTD = transformer(rows["tokens"])
    h_BRD, targets_BR = branch_region((h_BTD, rows["targets"]), answer)
    return token_statistics(transformer.head(), h_BRD, targets_BR, chunk).log_probs_BR.sum(1)


def steps(model: ModelConfig, answer: int, chunk: int) -> dict[str, Callable]:
    """Each way as a function of parameters, a `Batch` and derivatives [2, b]: gradients, and log-probs [2, b]."""

    def grad(log_probs: Callable, loss: Callable) -> Callable:
        def objective(params, rows, *more):
            found = log_probs(bind(model, params), rows, answer, chunk)
            return loss(found, *more), found

        return jax.grad(objective, has_aux=True)

    def at_once(transformer: Transformer, rows: dict, *sizes: int) -> jax.Array:
        return ordinary(transformer, jax.tree.map(lambda x: x.reshape(-1, x.shape[2]), rows), *sizes).reshape(2, -1)

    def in_turn(params, batch: Batch, derivatives_2b):
        one = grad(ordinary, lambda found, derivatives: jnp.sum(found * derivatives))

        def add(total, rows):
            grads, found = one(params, *rows)
            return jax.tree.map(jnp.add, total, grads), found

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (batch.ordinary, derivatives_2b))

    return {
        ONE: lambda params, batch, _: grad(with_branches, sigmoid_loss)(params, batch.branches),
        AT_ONCE: lambda params, batch, _: grad(at_once, sigmoid_loss)(params, batch.ordinary),
        IN_TURN: in_turn,
    }


def measure(step: Callable, *arguments: Any) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """Gradients, log-probs, and what the step takes: seconds (median and spread), bytes, seconds to compile."""
    start = time.perf_counter()
    compiled: Any = jax.jit(step).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    takes = {
        "compile_seconds": time.perf_counter() - start,
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes,
    }
    results: list[Any] = []

    def run() -> list[Any]:
        results.clear()  # lest two steps' gradients are there at a time
        results.extend(compiled(*arguments))
        return results

    takes |= time_steps(run)
    return results[0], np.asarray(results[1]), takes


def difference(grads: Any, others: Any) -> dict[str, float]:
    """Cosine of two sets of gradients, and the norm of their difference over that of `others`, over all parameters."""

    @jax.jit
    def products(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.array([jnp.sum(x * y), jnp.sum(x * x), jnp.sum(y * y), jnp.sum((x - y) ** 2)])

    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True)
    xy, xx, yy, dd = np.sum([np.asarray(products(*pair), np.float64) for pair in pairs], axis=0)
    return {"cosine": xy / math.sqrt(xx * yy), "difference": math.sqrt(dd / yy)}


def bench(
    model: ModelConfig, shape: Shape, answer: int, chunk: int, kept: str, ways: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of one shape: each of the ways, its time, and how far its gradients are from those of one pass."""
    rows: list[dict[str, Any]] = []
    params, batch = init_params(model, 0), random_pairs(model, shape, answer)
    twice = 2 * train_flops(model, shape.batch, shape.tokens - answer, answer)
    work = {ONE: train_flops(model, shape.batch, shape.tokens, 2 * answer), AT_ONCE: twice, IN_TURN: twice}
    nominal = nominal_peak(jax.devices()[0].device_kind)
    grads_of_one, derivatives = None, jnp.zeros((2, shape.batch))
    for name in ways:
        row = {"shape": str(shape), "way": name, "kept": kept, "implementation": f"{shape}, {name}, {kept}"}
        row |= {"answer": answer, "peer": False, "seconds": None, "reason": None}
        try:
            grads, log_probs, found = measure(steps(model, answer, chunk)[name], params, batch, derivatives)
        except jax.errors.JaxRuntimeError as e:
            rows.append(row | {"reason": f"failed: {' '.join(str(e).split())[:200]}"})
            continue
        if name == ONE:
            grads_of_one, derivatives = jax.device_get(grads), jax.grad(sigmoid_loss)(jnp.asarray(log_probs))
        elif grads_of_one is not None:
            row |= difference(grads_of_one, grads)
        del grads  # before the next way needs the memory
        row |= found | {
            "loss": float(sigmoid_loss(jnp.asarray(log_probs))),
            "tokens_a_second": shape.batch * shape.tokens / found["seconds"],
            "mfu": work[name] / found["seconds"] / nominal if nominal else None,
        }
        rows.append(row)
        print(f"{row['implementation']}: {found['seconds'] * 1e3:,.1f} ms", flush=True)
    two = min((row["seconds"] for row in rows if row["way"] != ONE and row["seconds"]), default=None)
    return [row | {"times": two / row["seconds"] if two and row["seconds"] else None} for row in rows]


COLUMNS = {
    "ms": lambda row: f"{row['seconds'] * 1e3:,.1f}",
    "spread": lambda row: f"{row['spread']:.1%}",
    "times as fast as two": lambda row: f"{row['times']:.2f}" if row["times"] else "",
    "tokens/s": lambda row: f"{row['tokens_a_second']:,.0f}",
    "MFU": lambda row: f"{row['mfu']:.1%}" if row["mfu"] else "",
    "GB": lambda row: f"{row['bytes'] / 1e9:.1f}",
    "loss": lambda row: f"{row['loss']:.4f}",
    "1 - cosine": lambda row: f"{1 - row['cosine']:.1e}" if "cosine" in row else "",
    "gradient differs by": lambda row: f"{row['difference']:.1e}" if "difference" in row else "",
    "compiled in s": lambda row: f"{row['compile_seconds']:.0f}",
}
NOTE = (
    "tokens/s counts each token of prompt and answers once, however often it is computed; MFU counts the products of "
    "each way's own passes; GB is what the compiled step takes, parameters and gradients included; gradients are "
    "compared with those of one pass."
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.preference", description="Times steps of DPO.")
    parser.add_argument(
        "overrides", nargs="*", default=["experiment=infinite_1b"], metavar="KEY=VALUE",
        help="as of experiments.sft (default: experiment=infinite_1b)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", default=["4x8k", "1x128k"], metavar="SHAPE",
        help="4x8k: 4 rows of 8k tokens, both answers included",
    )  # fmt: skip
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer (default: 128)")
    parser.add_argument(
        "--keep", nargs="+", default=["full"], metavar="WHAT",
        help="what the backward pass does not recompute: config (as the experiment says), full, dots, none, or names "
        "as of tools.bench.train",
    )  # fmt: skip
    two = {"at-once": AT_ONCE, "in-turn": IN_TURN}
    parser.add_argument(
        "--two", nargs="+", default=list(two), choices=two, help="which two passes (default: both); at once they take "
        "the memory of twice the rows",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="file for the results, rewritten after each shape")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    with one_line_errors():
        shapes = [Shape.parse(text) for text in args.shapes]
        config = compose_config(args.overrides)
        models = {text: config.model if text == "config" else keeping(config.model, text) for text in args.keep}
        with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
            results: dict[str, Any] = {"provenance": report.origin(), "note": NOTE, "rows": []}
            for shape in shapes:
                for kept, model in models.items():
                    results["rows"] += bench(
                        model, shape, args.answer, config.train.loss_chunk, kept, [ONE, *(two[way] for way in args.two)]
                    )
                    if args.out:
                        write_json(args.out, results)
        print("\n" + report.table(f"A step on pairs, answers of {args.answer} tokens", COLUMNS, results["rows"]) + NOTE)


if __name__ == "__main__":
    main()
